"""Builds by several processes, in parts, and after kills: always the same bytes, and nothing finished is repeated."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.building import build_folder
from data.building.build import build_shards, merge_parts
from data.building.build_folder import BuildFolder, BuildPart
from data.building.merge import BuildProgress, BuildReport
from data.errors import EXIT_TRY_AGAIN, DataError, LockHeld
from data.index import read_index
from tests.conftest import write_pictures
from tests.support.paths import ROOT

OPTIONS: dict[str, Any] = {"seed": 3, "samples_per_shard": 7, "validation_per_class": 4, "memory": 2**21}
"""The memory makes runs of 1, then 2 images."""

SCRIPT = """
import os, signal, sys
from pathlib import Path
from data.building import build_folder
from data.building.build import build_shards

def kill(progress):
    if progress.phase == sys.argv[4] and progress.share >= 0.5:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    build_shards(Path(sys.argv[1]), Path(sys.argv[2]), processes=int(sys.argv[3]), progress=kill, **{options})
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed build by one process."""
    destination = tmp_path_factory.mktemp("whole") / "out"
    build_shards(pictures, destination, **OPTIONS)
    return tree(destination)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    pictures: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    build_shards(pictures, tmp_path / "out", processes=3, **OPTIONS)
    assert tree(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_bytes_do_not_depend_on_the_memory_for_sorting(
    pictures: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    build_shards(pictures, tmp_path / "out", **OPTIONS | {"memory": 2**30})
    assert tree(tmp_path / "out") == whole


def test_parts_merge_to_the_same_bytes(pictures: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    counts = []
    for number in (2, 3, 1):
        report = build_shards(pictures, tmp_path / "out", part=(number, 3), **OPTIONS)
        counts.append(report.images)
        assert not (tmp_path / "out").exists()
    assert sum(counts) == 60
    assert min(counts) > 15
    report = merge_parts(tmp_path / "out")
    assert tree(tmp_path / "out") == whole
    assert report.indexes[tmp_path / "out" / "train"] == read_index(tmp_path / "out" / "train")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merging_names_the_missing_parts(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"out: no build to merge; begin one with: .* --part 1/N"):
        merge_parts(tmp_path / "out")
    for number in (2, 4):
        build_shards(pictures, tmp_path / "out", part=(number, 4), **OPTIONS)
    with pytest.raises(DataError, match=r"2 of 4 parts are not finished: 1/4, 3/4; run them with: .* --part 1/4"):
        merge_parts(tmp_path / "out")


@pytest.mark.parametrize("write", [merge_parts, lambda out: build_shards(out.with_name("pictures"), out, **OPTIONS)])
def test_nothing_is_written_while_a_part_is_being_read(
    pictures: Path, tmp_path: Path, write: Callable[[Path], BuildReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_folder, "_OWN_NODE_SECONDS", 0.0)
    (tmp_path / "pictures").symlink_to(pictures)
    for number in (1, 2):
        build_shards(tmp_path / "pictures", tmp_path / "out", part=(number, 2), **OPTIONS)
    building = BuildFolder(tmp_path / "out")
    with building.reading(BuildPart(2, 2)):  # again, for instance because Slurm repeats it
        unfinished = building.runs / ".run.writing"
        unfinished.touch()
        with pytest.raises(
            DataError,
            match=rf"out\.building: part 2/2 is still being read \(process {os.getpid()}\); wait for it or stop it",
        ):
            write(tmp_path / "out")
        assert unfinished.exists()
        with pytest.raises(DataError, match=r"another process reads part 2/2 or merges the parts"):
            build_shards(tmp_path / "pictures", tmp_path / "out", part=(2, 2), **OPTIONS)
    assert write(tmp_path / "out").images == 60


def test_a_lock_of_another_node_is_waited_for_and_ends_the_build_so_that_it_is_tried_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a node that went down: a file server releases it when it has missed the node."""
    monkeypatch.setattr(build_folder, "_OWN_NODE_SECONDS", 0.0)
    monkeypatch.setattr(build_folder, "_OTHER_NODE_SECONDS", 0.0)
    lock = tmp_path / ".out.building/lock"
    lock.parent.mkdir()
    lock.write_text("node9 4711\n")
    with open(lock, "rb+") as server:
        fcntl.flock(server, fcntl.LOCK_EX)
        with pytest.raises(
            LockHeld, match=r"another process is building there \(process 4711 on node node9\); .* If that node is down"
        ) as refused:
            build_shards(pictures, tmp_path / "out", **OPTIONS)
        assert (refused.value.exit_code, refused.value.retryable) == (EXIT_TRY_AGAIN, True)
        monkeypatch.setattr(build_folder, "_OTHER_NODE_SECONDS", 60.0)
        release = threading.Timer(0.1, fcntl.flock, (server, fcntl.LOCK_UN))
        release.start()
        assert build_shards(pictures, tmp_path / "out", **OPTIONS).images == 60
        release.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_with_the_fix(
    number: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such file system can be mounted here: a patched flock fails as it would."""

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(DataError, match="the file system has no file locks .*; build on another one, or mount it with"):
        build_shards(pictures, tmp_path / "out")


def test_everything_is_on_the_disk_before_the_runs_are_removed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, int]] = []
    fsync, remove = os.fsync, BuildFolder.remove
    at_removal: list[set[tuple[int, int]]] = []

    def inode(path: Path | int) -> tuple[int, int]:
        return os.stat(path).st_dev, os.stat(path).st_ino

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(inode(descriptor))

    def see(folder: BuildFolder) -> None:
        at_removal.append(set(flushed))
        assert list(folder.runs.glob("*.npz"))
        remove(folder)

    monkeypatch.setattr("os.fsync", flush)
    monkeypatch.setattr(BuildFolder, "remove", see)
    build_shards(pictures, tmp_path / "out", **OPTIONS)
    written = [tmp_path, tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(written) > 10
    assert {inode(path) for path in written} <= at_removal[-1]


def test_a_build_without_parts_reuses_the_runs_of_parts(
    pictures: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    build_shards(pictures, tmp_path / "out", part=(1, 2), **OPTIONS)
    made = {path: path.stat().st_ino for path in (tmp_path / ".out.building" / "runs").iterdir()}

    def see(progress: BuildProgress) -> None:
        assert all(path.stat().st_ino == number for path, number in made.items())

    build_shards(pictures, tmp_path / "out", progress=see, **OPTIONS)
    assert tree(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("phase", "folder"), [("reading images", "runs"), ("writing shards", "shards")])
def test_a_killed_build_continues_without_redoing_what_was_finished(
    pictures: Path, whole: dict[str, bytes], tmp_path: Path, processes: int, phase: str, folder: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{options}", repr(OPTIONS)))
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, script, pictures, out, str(processes), phase],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    done = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (tmp_path / ".out.building" / folder).rglob("*")
        if path.suffix in (".npz", ".tar")
        and not path.name.startswith(".")
        # A worker may be killed between a shard and its entry, and only with it the shard is finished.
        and (path.suffix == ".npz" or (tmp_path / ".out.building" / "entries" / f"{path.name}.json").exists())
    }
    assert len(done) >= 3

    kept = Counter[bool]()

    def see(progress: BuildProgress) -> None:
        assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done} == done
        kept[progress.kept] += progress.phase == phase

    build_shards(pictures, out, progress=see, **OPTIONS)
    assert kept[True] == len(done)
    assert kept[False] > 0
    assert tree(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "script.py"]


def interrupt(source: Path, destination: Path, **options: Any) -> None:
    """Begin a build and leave it when half of the images are read."""

    def stop(progress: BuildProgress) -> None:
        if progress.share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(source, destination, progress=stop, **OPTIONS | options)
    assert not destination.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, r"\.out\.building: contains an unfinished build with other options \(seed: 3 -> 4\)"),
        (
            {"short_side": 8, "quality": 90},
            r"\(conversion\.quality: 95 -> 90; conversion\.short_side: not given -> 8\)",
        ),
        (
            {"recompress": True, "subsampling": "4:2:0"},
            r"\(conversion\.recompress: false -> true; conversion\.subsampling: \"4:4:4\" -> \"4:2:0\"\)",
        ),
    ],
)
def test_other_options_do_not_continue_an_unfinished_build(
    pictures: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    interrupt(pictures, tmp_path / "out")
    with pytest.raises(DataError, match=message):
        build_shards(pictures, tmp_path / "out", **OPTIONS | options)


def test_a_build_that_was_begun_before_there_was_subsampling_continues(
    pictures: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt(pictures, tmp_path / "out")
    path = tmp_path / ".out.building" / "plan.json"
    plan = json.loads(path.read_text())
    for name in ("subsampling", "recompress", "restart_markers"):
        del plan["reading"]["conversion"][name]
    path.write_text(json.dumps(plan))
    kept = Counter[bool]()
    build_shards(pictures, tmp_path / "out", progress=lambda progress: kept.update([progress.kept]), **OPTIONS)
    assert kept[True] > 0
    assert tree(tmp_path / "out") == whole


def test_another_source_does_not_continue_an_unfinished_build(pictures: Path, tmp_path: Path) -> None:
    interrupt(pictures, tmp_path / "out")
    other = write_pictures(tmp_path / "other", per_class=20)
    with pytest.raises(DataError, match=r"\(source: .*/pictures\" -> .*/other\"\); continue .* or remove that folder"):
        build_shards(other, tmp_path / "out", **OPTIONS)


def test_shard_sizes_may_change_after_an_error(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class bright has only 20 .* \(what was read so far is kept in .*building"):
        build_shards(pictures, tmp_path / "out", **OPTIONS | {"validation_per_class": 20})
    options = OPTIONS | {"validation_per_class": 0, "samples_per_shard": 30}
    build_shards(pictures, tmp_path / "out", **options)
    build_shards(pictures, tmp_path / "again", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_images_that_appear_while_a_build_is_interrupted_are_in_it(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", per_class=10)
    interrupt(source, tmp_path / "out")
    late = source / "dark" / "0000_late.jpg"
    late.write_bytes((source / "bright" / "0003.jpg").read_bytes())
    build_shards(source, tmp_path / "out", **OPTIONS)
    build_shards(source, tmp_path / "again", **OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_a_broken_image_that_is_replaced_lets_the_build_continue(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", per_class=10)
    whole = (source / "dark" / "0003.jpg").read_bytes()
    (source / "dark" / "0003.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 30 images cannot be decoded: dark/0003\.jpg"):
        build_shards(source, tmp_path / "out", **OPTIONS)
    (source / "dark" / "0003.jpg").write_bytes(whole)
    assert build_shards(source, tmp_path / "out", **OPTIONS).images == 30


def test_two_builds_do_not_write_the_same_destination(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_folder, "_OWN_NODE_SECONDS", 0.0)

    def second(progress: BuildProgress) -> None:
        with pytest.raises(DataError, match="another process is building there"):
            build_shards(pictures, tmp_path / "out", **OPTIONS)

    build_shards(pictures, tmp_path / "out", progress=second, **OPTIONS)
