"""Locks of the kernel that are waited for, and what is said of the process that has one."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data.errors import EXIT_CONFIG, EXIT_TRY_AGAIN, DataError, LockHeld
from data.files.file_lock import hold, lock_within


def test_a_lock_names_its_holder_and_is_released_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path):
        assert path.read_text() == f"{os.uname().nodename} {os.getpid()}\n"
        with pytest.raises(DataError, match=f"^process {os.getpid()}$") as refused:
            hold(path, own=0.0, other=0.0)
        assert refused.value.exit_code == EXIT_CONFIG
    hold(path, own=0.0, other=0.0).close()


def test_the_lock_of_a_process_that_was_killed_is_free_whatever_its_file_says(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from data.files.file_lock import hold; lock = hold(pathlib.Path(sys.argv[1])); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
    assert (tmp_path / "lock").read_text().startswith(f"{os.uname().nodename} ")
    hold(tmp_path / "lock", own=0.0, other=0.0).close()


@pytest.mark.parametrize("text", ["node9 4711\n", "", "node9", "\xff\x00 x"])
def test_the_lock_of_another_node_is_waited_for_and_then_tried_again_later(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock"
    path.write_text(text)
    with open(path, "rb+") as server:
        fcntl.flock(server, fcntl.LOCK_EX)
        whose = "process 4711 on node node9" if "4711" in text else "a process of another node"
        with pytest.raises(LockHeld, match=f"^{whose}$") as refused:
            hold(path, own=0.0, other=0.0)
        assert (refused.value.exit_code, refused.value.retryable) == (EXIT_TRY_AGAIN, True)
        release = threading.Timer(0.1, fcntl.flock, (server, fcntl.LOCK_UN))
        release.start()
        hold(path, own=0.0, other=60.0).close()
        release.join()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = hold(path)
    path.unlink()
    second = lock_within(path, 0.0)
    assert second is not None
    assert lock_within(path, 0.0) is None
    first.close()
    second.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_nothing_takes_the_place_of_a_lock_that_a_file_system_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """No such file system can be mounted here: a patched flock fails as it would."""

    def no_locks(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match=os.strerror(number)) as refused:
        hold(tmp_path / "lock", own=0.0, other=0.0)
    assert refused.value.errno == number


def test_a_pipe_in_place_of_a_lock_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="No such device or address"):
        hold(tmp_path / "lock")
