"""Who can write a run folder: read-only and full file systems, other accounts, and locks of other nodes."""

import fcntl
import subprocess
import threading
from pathlib import Path

import pytest

from data.errors import EXIT_CONFIG, EXIT_TRY_AGAIN
from pipeline.errors import ConfigError, DiskFull, RunInUse
from pipeline.runs.run_access import hold
from pipeline.runs.run_folder import RunFolder
from tests.support.accounts import as_nameless, open_to_all
from tests.support.disk import small_file_system


@pytest.mark.slow(seconds=1)
def test_a_read_only_file_system_and_a_full_one_are_told_apart(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "256k") as disk:
        folder = RunFolder(disk / "runs/test/pretrain")
        folder.create()
        (disk / "ballast").write_bytes(bytes(200_000))
        with pytest.raises(DiskFull, match=f"run folder {folder.path}: No space left on device; make room, or") as full:
            folder.create()
        assert full.value.exit_code == EXIT_TRY_AGAIN
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(
            ConfigError, match=f"run folder {folder.path}: Read-only file system; set runs to a folder you can write"
        ) as read_only:
            folder.create()
        assert read_only.value.exit_code == EXIT_CONFIG


def test_runs_in_a_file_are_told_to_be_no_folder_and_not_a_damaged_result(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    folder = RunFolder(tmp_path / "runs/test/pretrain")
    assert folder.result() is None
    with pytest.raises(ConfigError, match=f"run folder {folder.path}: Not a directory; set runs to a folder you can"):
        folder.create()


@pytest.mark.parametrize("part", ["checkpoints", "events.jsonl", ".lock", "logs/rank-00000.log"])
def test_a_part_of_somebody_else_is_named_before_anything_runs(part: str, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    folder = RunFolder(tmp_path / "test")
    folder.create()
    for path in (folder.path, folder.validation, folder.logs, folder.checkpoints):
        path.chmod(0o777)
    if part == "checkpoints":
        folder.checkpoints.chmod(0o755)
    else:
        (folder.path / part).touch(0o644)
    with pytest.raises(ConfigError) as refused:
        as_nameless(folder.create)
    assert str(refused.value) == (
        f"run folder {folder.path}: {part} cannot be written, since it belongs to another user (uid 0); have its rights "
        "changed, or give the recipe another name"
    )
    (folder.path / part).chmod(0o777)
    as_nameless(folder.create)


def held(path: Path, node: str) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.events.begin(2, node, 4711)
    return folder


def test_a_lock_of_a_process_of_this_node_is_not_waited_for_long(tmp_path: Path) -> None:
    folder = held(tmp_path, "node1")
    with (
        folder.lock(),
        pytest.raises(
            ConfigError,
            match="another process is running this stage, process 4711 since .*; wait for it or stop it",
        ),
    ):
        hold(tmp_path / ".lock", folder.events, "node1", own=0.0)


def test_a_lock_of_another_node_ends_the_start_so_that_it_is_tried_again(tmp_path: Path) -> None:
    folder = held(tmp_path, "node1")
    with folder.lock(), pytest.raises(RunInUse) as refused:
        hold(tmp_path / ".lock", folder.events, "node2", own=0.0, other=0.0)
    assert refused.value.exit_code == EXIT_TRY_AGAIN
    message = str(refused.value)
    assert f"{tmp_path}: node node1 is running this stage, process 4711 since " in message
    assert "If that node is down, the file server releases its lock after a while" in message
    assert "remove" not in message


def test_a_lock_of_a_node_that_went_down_is_taken_once_the_file_server_releases_it(tmp_path: Path) -> None:
    folder = held(tmp_path, "node1")
    with open(tmp_path / ".lock", "ab") as server:
        fcntl.flock(server, fcntl.LOCK_EX)
        release = threading.Timer(0.2, fcntl.flock, (server, fcntl.LOCK_UN))
        release.start()
        hold(tmp_path / ".lock", folder.events, "node2", own=0.0, other=60.0).close()
        release.join()
