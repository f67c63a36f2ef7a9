"""Damaged files of an unfinished build are reported with the fix, or their content is made again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.building.build import build_shards, merge_parts
from data.building.merge import BuildProgress
from data.errors import DataError

Damage = Callable[[bytes], bytes]

DAMAGES = [
    pytest.param(lambda content: b"", id="empty"),
    pytest.param(lambda content: content[: len(content) // 2], id="torn"),
]
JSON_DAMAGES = [*DAMAGES, pytest.param(lambda content: b"{}", id="other types")]


def build_part(pictures: Path, destination: Path, number: int) -> None:
    build_shards(pictures, destination, part=(number, 2), samples_per_shard=7, memory=2**21)


@pytest.fixture
def unfinished(pictures: Path, tmp_path: Path) -> Path:
    """The folder of a build whose parts are read."""
    for number in (1, 2):
        build_part(pictures, tmp_path / "out", number)
    return tmp_path / ".out.building"


def spoil(path: Path, damage: Damage) -> None:
    path.write_bytes(damage(path.read_bytes()))


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_plan_is_named(unfinished: Path, pictures: Path, damage: Damage) -> None:
    spoil(unfinished / "plan.json", damage)
    message = r"plan\.json: not the plan of a build \(.+\); remove .*\.out\.building to start again"
    with pytest.raises(DataError, match=message):
        merge_parts(unfinished.with_name("out"))
    with pytest.raises(DataError, match=message):
        build_part(pictures, unfinished.with_name("out"), 1)


@pytest.mark.parametrize("damage", [*JSON_DAMAGES, pytest.param(lambda content: b"[1]", id="numbers")])
def test_a_damaged_part_is_named(unfinished: Path, pictures: Path, damage: Damage) -> None:
    spoil(unfinished / "parts" / "2-of-2.json", damage)
    with pytest.raises(DataError, match=r"2-of-2\.json: not the runs of a part \(.+\); remove it and .* --part 2/2"):
        merge_parts(unfinished.with_name("out"))
    (unfinished / "parts" / "2-of-2.json").unlink()
    build_part(pictures, unfinished.with_name("out"), 2)
    assert merge_parts(unfinished.with_name("out")).images == 60


def without_labels(content: bytes) -> bytes:
    return content.replace(b"labels.npy", b"lapels.npy")


@pytest.mark.parametrize("damage", [*DAMAGES, pytest.param(without_labels, id="without an array")])
def test_a_damaged_run_table_is_named(unfinished: Path, pictures: Path, damage: Damage) -> None:
    table = sorted((unfinished / "runs").glob("*.npz"))[0]
    spoil(table, damage)
    message = rf"{table.name}: not the table of a run \(.+\); remove it and read the source again"
    with pytest.raises(DataError, match=message):
        merge_parts(unfinished.with_name("out"))
    with pytest.raises(DataError, match=message):
        build_part(pictures, unfinished.with_name("out"), 1)
    table.unlink()
    build_part(pictures, unfinished.with_name("out"), 1)
    assert merge_parts(unfinished.with_name("out")).images == 60


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("rank", np.zeros(3, np.float32)),
        ("names", np.zeros((3, 2), np.uint8)),
        ("about", np.frombuffer(b'{"classes": [1]}', np.uint8)),
        ("about", np.frombuffer(b"", np.uint8)),
    ],
)
def test_a_run_table_of_other_types_is_named(unfinished: Path, name: str, array: np.ndarray) -> None:
    table = sorted((unfinished / "runs").glob("*.npz"))[0]
    with np.load(table) as arrays:
        content = dict(arrays)
    np.savez(table, **content | {name: array})
    with pytest.raises(DataError, match=rf"{table.name}: not the table of a run"):
        merge_parts(unfinished.with_name("out"))


def test_a_missing_run_table_is_named(unfinished: Path) -> None:
    table = sorted((unfinished / "runs").glob("*.npz"))[0]
    table.unlink()
    with pytest.raises(DataError, match=rf"{table.name}: not the table of a run \(.*No such file"):
        merge_parts(unfinished.with_name("out"))


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_shard_with_a_damaged_entry_is_written_again(unfinished: Path, damage: Damage) -> None:
    def stop(progress: BuildProgress) -> None:
        if progress.share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_parts(unfinished.with_name("out"), progress=stop)
    entries = sorted((unfinished / "entries").glob("*.json"))
    assert len(entries) > 3
    before = {entry.stem: (unfinished / "shards" / entry.stem).stat().st_ino for entry in entries}
    spoil(entries[1], damage)
    report = merge_parts(unfinished.with_name("out"))
    after = {name: (unfinished.with_name("out") / name).stat().st_ino for name in before}
    assert [name for name in before if after[name] != before[name]] == [entries[1].stem]
    assert report.images == 60
