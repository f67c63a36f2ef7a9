"""The estimate of how many classes a batch mixes, and the settings with which it mixes enough."""

from dataclasses import replace

import numpy as np
import pytest

from data.classes.class_mixing import class_mixing, mixing_advice, remedies
from data.order import SampleOrder

CLASSES, PER_CLASS, SHARDS = 200, 100, 100
SORTED = np.repeat(np.arange(CLASSES, dtype=np.int32), PER_CLASS)[:, None]
SHUFFLED = np.random.default_rng(0).permutation(SORTED)
ORDER = SampleOrder(np.full(SHARDS, len(SORTED) // SHARDS), seed=0, batch=256, lanes=16, window=200)


def test_the_estimate_is_the_mean_over_an_epoch() -> None:
    steps = ORDER.samples // ORDER.batch
    found = [SORTED[ORDER.at(step, 0, 256).id, 0] for step in range(steps)]
    batches = np.mean([len(np.unique(labels)) for labels in found])
    micro_batches = np.mean([len(np.unique(part)) for labels in found for part in labels.reshape(-1, 32)])
    exact = class_mixing(SORTED, ORDER, 32, steps)
    assert exact.batch.classes == batches
    assert exact.micro_batch.classes == micro_batches
    estimate = class_mixing(SORTED, ORDER, 32)
    assert estimate.batch.classes == pytest.approx(batches, rel=0.1)
    assert estimate.batch.shuffled == CLASSES * (1 - (1 - 1 / CLASSES) ** 256)
    assert not estimate.is_enough


def test_shuffled_shards_mix_enough() -> None:
    mixing = class_mixing(SHUFFLED, ORDER, 32)
    assert 0.95 < mixing.batch.share < 1.05
    assert 0.95 < mixing.micro_batch.share < 1.05
    assert mixing_advice(SHUFFLED, ORDER, 32, "in21k")[1] is None


def test_the_proposed_settings_mix_enough_and_smaller_ones_do_not() -> None:
    found = remedies(SORTED, ORDER, 256)
    assert found.lanes is not None
    assert found.window is not None
    assert class_mixing(SORTED, replace(ORDER, lanes=found.lanes), 256).is_enough
    assert class_mixing(SORTED, replace(ORDER, window=found.window), 256).is_enough
    assert not class_mixing(SORTED, replace(ORDER, lanes=found.lanes // 2), 256).is_enough
    assert not class_mixing(SORTED, replace(ORDER, window=found.window // 2), 256).is_enough
    what, fix = mixing_advice(SORTED, ORDER, 256, "in21k")
    assert what.startswith("a batch of 256 has on average 43 classes (145 if all samples were shuffled)")
    assert fix == (
        f"set data.lanes to {found.lanes} or data.shuffle_window to {found.window}, or shuffle them once with: "
        "coatnet shards build in21k NEW_FOLDER"
    )


def test_where_no_setting_mixes_enough_the_shards_are_to_be_shuffled() -> None:
    # With a lane for each sample of the batch, a micro-batch of 32 still reads an eighth of the epoch: 12 shards.
    _, fix = mixing_advice(SORTED, ORDER, 32, "in21k")
    assert fix == (
        "no data.lanes and no data.shuffle_window mixes enough: shuffle them once with: "
        "coatnet shards build in21k NEW_FOLDER"
    )


def test_each_class_of_a_sample_counts_and_padding_does_not() -> None:
    labels = np.array([[0, 1], [0, -1], [2, 2], [-1, -1]], np.int32)
    order = SampleOrder(np.array([4]), seed=0, batch=4, lanes=2, window=4)
    mixing = class_mixing(labels, order, 4)
    assert mixing.batch.classes == mixing.micro_batch.classes == 3
    assert mixing.batch.shuffled == (1 - 0.5**4) + 2 * (1 - 0.75**4)
