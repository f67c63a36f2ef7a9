"""Datasets as those of the classes of a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.classes.class_matching import for_classes
from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.remote.storage import Storage


@pytest.fixture
def dataset(shards: Path) -> Dataset:
    return open_dataset(str(shards / "validation"), Storage())


def test_equal_classes_are_left_as_they_are(dataset: Dataset) -> None:
    assert for_classes(dataset, ["bright", "dark", "striped"], "m") is dataset


def test_classes_in_another_order_among_more_are_matched_by_name(dataset: Dataset) -> None:
    matched = for_classes(dataset, ("striped", "cat", "dark", "bright"), "m")
    assert matched.classes == ("striped", "cat", "dark", "bright")
    assert [matched.labels(str(number).encode()) for number in range(3)] == [(3,), (2,), (0,)]
    assert matched.samples == dataset.samples


def test_a_label_map_comes_first_and_what_it_drops_stays_dropped(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("rename: {bright: day, dark: night}\nothers: drop\n")
    mapped = open_dataset(str(shards / "validation"), Storage(), tmp_path / "map.yaml")
    matched = for_classes(mapped, ("night", "noon", "day"), "m")
    assert matched.label_map is not None
    assert matched.label_map.targets.tolist() == [2, 0, -1]
    assert (matched.samples, matched.labels(b"0")) == (10, (2,))
    with pytest.raises(ValueError, match="the label striped is dropped by the label map"):
        matched.labels(b"2")


def test_classes_that_the_model_does_not_have_are_named_with_the_fix(dataset: Dataset, shards: Path) -> None:
    with pytest.raises(DataError) as refused:
        for_classes(dataset, ("brigt", "dark"), "runs/x", "; and a hint")
    assert str(refused.value) == (
        f"{shards}/validation: 2 of its 3 classes are not among the 2 of runs/x (bright, striped); say which they are by "
        "--label-map FILE, with lines such as `rename: {bright: brigt}`, and `others: drop` to leave out the samples of "
        "the others; and a hint"
    )


def test_names_that_are_repeated_cannot_be_matched(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"m: several classes are called crane, .* --classes"):
        for_classes(dataset, ("crane", "crane", "dark"), "m")
    twice = replace(dataset, index=replace(dataset.index, classes=("crane", "crane", "dark")))
    assert for_classes(twice, ("crane", "crane", "dark"), "m") is twice
    assert np.array_equal(twice.shard_samples, dataset.shard_samples)
