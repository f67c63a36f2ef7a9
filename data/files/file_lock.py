"""Locks of the kernel on files. They are released when their process ends, however it ends.

Own code rather than filelock's, which on a file system without locks takes the existence of a file for one: that of a
process which was killed, or whose node went down, would never be released.
"""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from data.errors import DataError, LockHeld
from data.files.atomic_file import open_no_link
from data.files.regular_file import open_regular

OWN_NODE_SECONDS = 10.0
OTHER_NODE_SECONDS = 120.0
"""A file server keeps the locks of a node that went down until it misses it: with NFSv4 for 90 seconds."""

RELEASED_LATER = "If that node is down, the file server releases its lock after a while"
"""For messages of a `LockHeld`."""

_POLL_SECONDS = 0.1
_PROBE = 1 << 16  # bytes; less than any start writes
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


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
        if error.errno not in NO_LOCKS:
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
    except (BlockingIOError, PermissionError):  # some file systems say EACCES
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file


def lock_within(path: Path, seconds: float) -> BinaryIO | None:
    """As `locked`, or None if another process still holds the lock after `seconds`.

    Raises:
        OSError: as for `locked`.
    """
    end = time.monotonic() + seconds
    while True:
        file = try_lock(path)
        if file is not None:
            if is_at(path, file):
                return file
            file.close()
        elif (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        else:
            return None


def hold(path: Path, *, own: float = OWN_NODE_SECONDS, other: float = OTHER_NODE_SECONDS) -> BinaryIO:
    """The file at `path`, locked until it is closed; it has the name of this node and the number of this process.

    A process of this node that has the lock is waited for `own` seconds, one of another node `other` seconds: the lock
    of a node that went down is released by the file server, later.

    Raises:
        DataError: a process of this node has it; the message begins with its number.
        LockHeld: a process of another node has it; the message begins with its number and node.
        OSError: as for `locked`.
    """
    node = os.uname().nodename
    file, there, process = lock_within(path, own), "", ""
    if file is None:
        there, process = _holder(path)
        if there == node:
            raise DataError(process)
        file = lock_within(path, other - own)
    if file is None:
        raise LockHeld(f"{process} on node {there}" if there else "a process of another node")
    with contextlib.suppress(OSError):  # on a full disk, the next one does not learn the name
        file.truncate(0)
        file.write(f"{node} {os.getpid()}\n".encode())
        file.flush()
    return file


def _holder(path: Path) -> tuple[str, str]:
    """The node and the process that have the lock; empty if that is not known."""
    try:
        with open_regular(path) as file:
            node, pid = file.read(1024).decode().split()
            return node, f"process {int(pid)}"
    except (OSError, ValueError):
        return "", ""


def is_at(path: Path, file: BinaryIO) -> bool:
    """Whether `path` is still the open `file`, which cleaners of temporary folders may have removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
