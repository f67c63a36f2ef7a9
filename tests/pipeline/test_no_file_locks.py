"""File systems without locks are reported with what to do, wherever locks are needed; as Lustre and NFS may be mounted."""

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import EXIT_CONFIG, DataError
from data.remote.cache import Cache
from jobs.scheduler.submissions import SubmissionFolder
from pipeline.runs.run_folder import RunFolder


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    ("use", "fix"),
    [
        (lambda folder: Cache(folder, 10**9).make(), "set data.cache.folder to a folder on a disk of this node"),
        (lambda folder: RunFolder(folder).create(), "set runs to a folder on another file system"),
        (lambda folder: SubmissionFolder(folder).lock(), "set runs to a folder on another file system"),
    ],
)
def test_a_file_system_without_locks_is_reported_with_the_fix(
    number: int, use: Callable[[Path], object], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such file system can be mounted here: the error is raised where locking meets it."""

    def no_locks(file: object, operation: int) -> None:
        raise OSError(number, "not that of the system")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DataError, match=rf"x: its file system has no file locks \(.*; {fix}, or mount it") as caught:
        use(tmp_path / "x")
    assert caught.value.exit_code == EXIT_CONFIG
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_never_counts_as_a_lock_of_the_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above. Left by a process that was killed, it would refuse every later start."""
    folder = RunFolder(tmp_path)
    folder.create()

    def no_locks(file: object, operation: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="no locks"):
        folder.lock()
