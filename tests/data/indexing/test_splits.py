"""Training and validation shards, or several datasets, in one place."""

from pathlib import Path

import pytest

from data.errors import DataError
from data.indexing.index_shards import index_shards
from data.indexing.splits import describe_groups, naming_pattern
from tests.support.third_party import picture, write_members

JPEG = picture(0)
SAMPLE = [("a.jpg", JPEG), ("a.cls", b"0")]
SPLITS = {"x-train-0000": 0, "x-train-0001": 1, "x-validation-00": 2}


@pytest.mark.parametrize("shards", [["train/n01/a val/n01/b"], ["train/a", "val/b"]])
def test_samples_in_folders_of_several_splits_are_not_mixed_without_a_word(tmp_path: Path, shards: list[str]) -> None:
    for number, keys in enumerate(shards):
        members = [member for key in keys.split() for member in ((f"{key}.jpg", JPEG), (f"{key}.cls", b"0"))]
        write_members(tmp_path / f"a-{number}.tar", members)
    with pytest.raises(DataError, match=r"several splits: training \(train/.*\), validation \(val/.*--mix-splits"):
        index_shards([str(tmp_path)])
    assert index_shards([str(tmp_path)], mix_splits=True).index.samples == 2


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    for name, label in SPLITS.items():
        write_members(tmp_path / f"{name}.tar", [(f"{name}.jpg", JPEG), (f"{name}.cls", str(label).encode())])
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/x-*.tar", "/**/*.tar"])
def test_shards_of_several_splits_are_refused_with_their_patterns(splits: Path, pattern: str) -> None:
    with pytest.raises(
        DataError,
        match=r"2 training \(x-train-0000.tar\), 1 validation \(x-validation-00.tar\)\. Index each by its pattern, "
        r"'.*/x-train-\{0000..0001\}.tar' and '.*/x-validation-\{00..00\}.tar'.*--output.*--mix-splits",
    ):
        index_shards([str(splits) + pattern])
    assert index_shards([str(splits) + pattern], mix_splits=True).index.samples == 3


@pytest.mark.parametrize(
    ("patterns", "samples"),
    [
        (["x-train-{0000..0001}.tar"], 2),
        (["x-validation-*.tar"], 1),
        (["x-{train-0000,train-0001,validation-00}.tar"], 3),
        (["x-train-*.tar", "x-validation-*.tar"], 3),
    ],
)
def test_splits_that_the_patterns_name_are_indexed(splits: Path, patterns: list[str], samples: int) -> None:
    assert index_shards([f"{splits}/{pattern}" for pattern in patterns]).index.samples == samples


def test_shards_that_are_only_partly_of_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("x-0.tar", "x-val-0.tar"):
        write_members(tmp_path / name, SAMPLE)
    with pytest.raises(DataError, match=r"1 other \(x-0.tar\), 1 validation \(x-val-0.tar\)"):
        index_shards([str(tmp_path)])
    (tmp_path / "x-val-0.tar").rename(tmp_path / "x-train-0.tar")
    assert index_shards([str(tmp_path)]).index.samples == 2


def test_splits_in_folders_are_refused_too(tmp_path: Path) -> None:
    for name in ("train/0.tar", "val/0.tar"):
        write_members(tmp_path / name, SAMPLE)
    with pytest.raises(DataError, match=r"1 training \(train/0.tar\), 1 validation \(val/0.tar\)"):
        index_shards([f"{tmp_path}/**/*.tar"])


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["a-08.tar", "a-09.tar", "a-10.tar"], "a-{08..10}.tar"),
        (["a-1.tar", "a-3.tar"], "a-*.tar"),
        (["a-9.tar", "a-10.tar"], "a-*.tar"),
        (["abc.tar", "abd.tar"], "ab*.tar"),
    ],
)
def test_a_pattern_is_found_for_names(names: list[str], pattern: str) -> None:
    assert naming_pattern(names) == pattern


def test_names_of_several_kinds_are_remarked_on_unless_each_is_different() -> None:
    assert describe_groups([f"a-{n}.tar" for n in range(3)]) is None
    assert describe_groups(["a.tar", "b.tar", "c.tar"]) is None
    assert describe_groups([f"a-{n}.tar?signature={'x' * n}" for n in range(4)]) is None
    several = describe_groups([f"{name}-{n}.tar" for name in "ab" for n in range(3)])
    assert several is not None
    assert "one dataset: a-{0..2}.tar (3), b-{0..2}.tar (3)" in several
