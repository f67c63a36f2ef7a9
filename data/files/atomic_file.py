"""Atomic writes that survive power failures: write to another name, flush to the disk, rename."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNFINISHED = ".writing"
"""The suffix of files that are being written."""


def unfinished_path(path: Path) -> Path:
    """The hidden name in the same folder under which `path` is written."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def open_no_link(path: Path, mode: Literal["ab", "rb+", "wb", "wb+"]) -> BinaryIO:
    """`open(path, mode)`, but not if `path` is a symbolic link or a pipe, which another user may have put there.

    Raises:
        OSError: it is a link (ELOOP) or a pipe that nobody reads (ENXIO), or cannot be opened.
    """
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write a file to; it becomes `path`, on the disk, when the block ends without an error.

    After an error it is removed, and the previous file at `path` is unchanged.

    Args:
        path: of the file; its folder must exist.
        shared: several processes may write the file concurrently, each under a name of its own.

    Raises:
        OSError: it cannot be written; that of a full disk, too, names `path`.
    """
    unfinished = unfinished_path(path)
    if shared:
        unfinished = unfinished.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with open_no_link(unfinished, "wb") as empty:
            mode = stat.S_IMODE(os.fstat(empty.fileno()).st_mode)
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fchmod(file.fileno(), mode)  # that of the umask: libraries may write a file for its owner alone
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:  # as from `write`
            error.filename = str(path)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """An open file that becomes `path`; see `atomic_path`."""
    with atomic_path(path, shared=shared) as unfinished, open_no_link(unfinished, "wb") as file:
        yield file


def write_atomically(path: Path, content: bytes | str, *, shared: bool = False) -> None:
    """Replace the file at `path` by `content`; see `atomic_path`."""
    with atomic_file(path, shared=shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk.

    Raises:
        OSError: it cannot be flushed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
