"""Sizes of files on mounted file systems, with one look at each: those that are shared take about a millisecond."""

import errno
import itertools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from data.files.concurrent_calls import call_concurrently

CONCURRENT_LOOKS = 32
"""Operations on files that are made at the same time."""

_TOGETHER = 16  # files that one thread looks at in turn: threads exchange little
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def file_sizes(folder: str, names: Sequence[str]) -> dict[str, int]:
    """Name -> size in bytes of those of the files `names` that exist in `folder`, in their order.

    Each is looked at by itself, many at a time: a listing has no sizes, and would come on top.

    Raises:
        FileNotFoundError: no such folder.
        OSError: a file cannot be looked at.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(folder)
    found = zip(names, statuses(folder, names), strict=True)
    return {name: status.st_size for name, status in found if status is not None and stat.S_ISREG(status.st_mode)}


def statuses(folder: str, names: Sequence[str]) -> list[os.stat_result | None]:
    """What `names` in `folder` are, in their order; None for those that do not exist, as in a link to nowhere.

    Raises:
        OSError: one cannot be looked at.
    """

    def look(some: Sequence[str]) -> list[os.stat_result | None]:
        return [_status(f"{folder}/{name}") for name in some]

    parts = [names[start : start + _TOGETHER] for start in range(0, len(names), _TOGETHER)]
    return list(itertools.chain.from_iterable(call_concurrently(look, parts, CONCURRENT_LOOKS)))


def regular_files(folder: str | Path) -> list[str]:
    """Names of the regular files in `folder`, without a look at each where the listing tells what they are.

    Raises:
        FileNotFoundError: no such folder.
    """
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_file()]


def regular_size(path: str) -> int | None:
    """Size in bytes of the file at `path`; None if there is none, or something else than a regular file.

    Raises:
        OSError: it cannot be looked at.
    """
    status = _status(path)
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return None
