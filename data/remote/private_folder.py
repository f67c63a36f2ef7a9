"""Folders that only their user can change, in places where other users of the machine can write, such as `/tmp`."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from data.errors import DataError


def make_private(folder: Path, names: Iterable[str]) -> None:
    """Create `folder`, with the folders `names` in it, for this user alone, unless they exist.

    Raises:
        DataError: one of them is a link, of another user, or writable by others, who could have put files there.
        OSError: one cannot be created.
    """
    if not folder.parent.is_dir():
        if folder.parent.exists():
            raise _no_folder()
        folder.parent.mkdir(parents=True, exist_ok=True)
    for path in (folder, *(folder / name for name in names)):
        with suppress(FileExistsError):
            path.mkdir(mode=stat.S_IRWXU)
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise _untrusted(folder, f"{_shown(path, folder)} is a link")
        if not stat.S_ISDIR(status.st_mode):
            raise _no_folder()
        if status.st_uid != os.geteuid():
            raise _untrusted(folder, f"{_shown(path, folder)} belongs to another user (uid {status.st_uid})")
        mode = stat.S_IMODE(status.st_mode)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _untrusted(folder, f"{_shown(path, folder)} can be changed by other users (mode {mode:o})")


def check_private_files(folder: Path, names: Iterable[str]) -> None:
    """Check that the files beside and in the folders `names` in `folder` belong to this user alone and are not links.

    Other folders that the user keeps in `folder` are not looked at.

    Raises:
        DataError: one belongs to another user or is a link.
        OSError: they cannot be listed.
    """
    for place in (folder, *(folder / name for name in names)):
        with os.scandir(place) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed in the meantime
                    status = entry.stat(follow_symlinks=False)
                    shown = _shown(Path(entry.path), folder)
                    if stat.S_ISDIR(status.st_mode):
                        continue
                    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                        raise _untrusted(folder, f"{shown} is a link or not a file")
                    if status.st_uid != os.geteuid():
                        raise _untrusted(folder, f"{shown} belongs to another user (uid {status.st_uid})")


def _no_folder() -> OSError:
    return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _shown(path: Path, folder: Path) -> str:
    return "it" if path == folder else str(path.relative_to(folder))


def _untrusted(folder: Path, problem: str) -> DataError:
    return DataError(
        f"{folder}: {problem}, so what is in it need not be yours; set data.cache.folder to a folder that only you can "
        "write, or remove this one if it is yours"
    )
