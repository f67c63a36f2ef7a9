"""The smallest set of samples that makes a micro-batch not finite."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data.images.random_erasing import ErasedRectangle
from models.coatnet import CoAtNet
from pipeline.replay.bisection import Cause, minimal, smallest_cause
from pipeline.replay.not_finite import NotFinite
from tests.pipeline.replay.brightness import (
    BRIGHT,
    DARK,
    DETECTING,
    STEP,
    micro_batch,
    observed_model,
    overflow_forward,
    overflow_gradient,
    planned,
)


class Trials:
    """Subsets that were tried."""

    def __init__(self, fails: Callable[[frozenset[int]], bool]) -> None:
        self.fails = fails
        self.tried: list[tuple[int, ...]] = []

    def __call__(self, subset: tuple[int, ...]) -> bool:
        self.tried.append(subset)
        return self.fails(frozenset(subset))


def check(candidates: list[int], fails: Callable[[frozenset[int]], bool]) -> tuple[int, ...]:
    trials = Trials(fails)
    found = minimal(candidates, trials)
    assert fails(frozenset(found))
    assert list(found) == [one for one in candidates if one in found]
    if len(found) > 1:
        assert not any(fails(frozenset(found) - {one}) for one in found)
    assert () not in trials.tried
    n = len(candidates)
    assert len(trials.tried) <= n * n + 3 * n
    return found


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_a_set_that_must_be_whole_is_found(size: int, data: st.DataObject) -> None:
    cause = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    assert set(check(list(range(size)), cause.issubset)) == cause


@settings(deadline=None)
@given(st.integers(1, 20), st.data())
def test_one_of_several_causes_is_found(size: int, data: st.DataObject) -> None:
    causes = data.draw(st.lists(st.frozensets(st.integers(0, size - 1), min_size=1), min_size=1, max_size=4))
    assert frozenset(check(list(range(size)), lambda subset: any(one <= subset for one in causes))) in causes


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_what_fails_with_some_samples_and_not_with_more_has_a_minimal_set_too(size: int, random: object) -> None:
    draws = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    verdicts = draws.random(2**size) < 0.4
    verdicts[0], verdicts[-1] = False, True
    check(list(range(size)), lambda subset: bool(verdicts[sum(1 << one for one in subset)]))


@pytest.mark.parametrize("cause", [{0}, {63}, {17}])
def test_one_of_many_samples_takes_few_trials(cause: set[int]) -> None:
    trials = Trials(cause.issubset)
    assert minimal(range(64), trials) == tuple(cause)
    assert len(trials.tried) <= 2 * math.log2(64)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("change", "name", "kind", "samples"),
    [(overflow_forward, "stem.conv2", "output", True), (overflow_gradient, "stem.conv2.weight", "gradient", False)],
)
def test_the_one_bright_image_is_found(
    shards: Path, tmp_path: Path, place: int, change: Callable[[CoAtNet], None], name: str, kind: str, samples: bool
) -> None:
    plan = planned(shards, tmp_path, DETECTING)
    batch = micro_batch(plan, [BRIGHT if position == place else DARK for position in range(4)])
    cause = smallest_cause(observed_model(plan, change), batch, STEP, 0)
    assert (cause.kind, cause.positions, cause.origins) == ("samples", (place,), (batch.origins[place],))
    assert cause.origins[0].key.startswith("bright/")
    assert cause.not_finite is not None
    assert (cause.not_finite.name, cause.not_finite.kind) == (name, kind)
    assert cause.not_finite.samples == ((place,) if samples else ())
    # The micro-batch, the neutral images, two halves at most, two samples at most, and the one alone.
    assert cause.trials <= 7


def test_two_images_that_are_bright_only_when_they_are_mixed_are_both_found(shards: Path, tmp_path: Path) -> None:
    sizes = ("batch.micro_size=8", "batch.global_size=8")
    plan = planned(shards, tmp_path, DETECTING, *sizes, "mixup_alpha=10000")  # half of each, as good as always
    batch = micro_batch(plan, [DARK] * 8)
    batch.images[[2, 5]] = 250  # 2.3 normalized; 1.3 if mixed with grey
    observed = observed_model(plan, lambda model: overflow_forward(model, threshold=1.8))
    cause = smallest_cause(observed, batch, STEP, 0)
    assert (cause.kind, cause.positions) == ("samples", (2, 5))
    assert cause.not_finite is not None
    assert cause.not_finite.samples == (2, 5)


def test_an_erased_rectangle_belongs_to_its_sample(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path)
    spots = [ErasedRectangle(slice(0, 2), slice(0, 2), np.full((1, 1, 3), value, np.float32)) for value in (0, np.inf)]
    batch = replace(micro_batch(plan), erased=[(1, spots[0]), (2, spots[1]), (3, spots[0])])
    cause = smallest_cause(observed_model(plan, lambda model: None), batch, STEP, 0)
    assert (cause.kind, cause.positions) == ("samples", (2,))
    assert cause.not_finite == NotFinite("images", "input", 12, 4 * 32 * 32 * 3, (2,))


def test_a_micro_batch_that_is_finite_has_no_cause(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path)
    cause = smallest_cause(observed_model(plan, lambda model: None), micro_batch(plan), STEP, 0)
    assert cause == Cause("nothing", (), (), None, trials=1)


def test_weights_that_are_not_finite_are_the_cause_whatever_the_samples(shards: Path, tmp_path: Path) -> None:
    def spoil(model: CoAtNet) -> None:
        assert isinstance(model.head.classifier, nn.Linear)
        model.head.classifier.bias[1] = math.nan

    plan = planned(shards, tmp_path)
    cause = smallest_cause(observed_model(plan, spoil), micro_batch(plan), STEP, 0)
    assert cause == Cause("weights", (), (), NotFinite("head.classifier.bias", "weight", 1, 3, ()), trials=1)


def test_finite_weights_that_overflow_with_any_samples_are_told_from_samples(shards: Path, tmp_path: Path) -> None:
    def enlarge(model: CoAtNet) -> None:
        model.head.norm.weight.fill_(3e38)

    plan = planned(shards, tmp_path)
    cause = smallest_cause(observed_model(plan, enlarge), micro_batch(plan), STEP, 0)
    assert (cause.kind, cause.positions, cause.origins, cause.trials) == ("any_samples", (), (), 4)
    assert cause.not_finite is not None
    assert (cause.not_finite.name, cause.not_finite.samples) == ("head.norm", (0, 1, 2, 3))


def test_noise_is_neutral_where_grey_images_are_not(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path, DETECTING)
    batch = micro_batch(plan, [DARK, BRIGHT, DARK, DARK])
    observed = observed_model(plan, overflow_forward)
    # As a norm over pixels without an epsilon.
    observed.model.stem.register_forward_pre_hook(lambda _, inputs: inputs[0] + 0 / inputs[0].std((1, 2), keepdim=True))
    grey = replace(batch, images=np.full_like(batch.images, 128))
    assert not observed.is_finite(grey, STEP, 0)
    cause = smallest_cause(observed, batch, STEP, 0)
    assert (cause.kind, cause.positions) == ("samples", (1,))
    assert cause.not_finite is not None
    assert (cause.not_finite.name, cause.not_finite.samples) == ("stem.conv2", (1,))
