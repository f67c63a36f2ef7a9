"""Locks of the kernel on files. They are released when their process ends, however it ends."""

import errno
import fcntl
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from data.atomic_file import open_no_link
from data.errors import DataError

_PROBE = 1 << 16  # bytes; less than any start writes
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def check_locks(folder: Path, fix: str) -> None:
    """Check that files in `folder` can be written and locked; `fix` is what to do if they cannot be locked.

    Raises:
        DataError: its file system has no locks.
        OSError: no file can be created there, or the disk is full.
    """
    try:
        with TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(bytes(_PROBE))
            file.flush()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise DataError(
            f"{folder}: its file system has no file locks ({os.strerror(error.errno)}), without which processes may "
            f"write the same files; {fix}, or mount it with locks (Lustre: -o flock, NFS: with lockd)"
        ) from None


def locked(path: Path) -> BinaryIO:
    """The file at `path`, created if necessary, locked against all other processes until it is closed.

    Raises:
        OSError: it cannot be opened, or its file system has no locks.
    """
    while True:
        file = open_no_link(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            file.close()
            raise
        if is_at(path, file):
            return file
        file.close()  # removed while this process waited


def try_lock(path: Path, *, create: bool = True) -> BinaryIO | None:
    """As `locked`, or None at once if another process holds the lock.

    Raises:
        FileNotFoundError: there is no such file, and none is to be created.
        OSError: as for `locked`.
    """
    file = open_no_link(path, "ab" if create else "rb+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file


def is_at(path: Path, file: BinaryIO) -> bool:
    """Whether `path` is still the open `file`, which cleaners of temporary folders may have removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
