"""Sizes of files on mounted file systems, with one look at each: those that are shared take about a millisecond."""

import errno
import itertools
import os
import stat
from collections.abc import Sequence

from data.files.concurrent_calls import call_concurrently

CONCURRENT_LOOKS = 32
"""Operations on files that are made at the same time."""

_TOGETHER = 256  # files that one thread looks at in turn: threads exchange little
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

    def sizes(some: Sequence[str]) -> list[int | None]:
        return [regular_size(f"{folder}/{name}") for name in some]

    parts = [names[start : start + _TOGETHER] for start in range(0, len(names), _TOGETHER)]
    found = itertools.chain.from_iterable(call_concurrently(sizes, parts, CONCURRENT_LOOKS))
    return {name: size for name, size in zip(names, found, strict=True) if size is not None}


def regular_size(path: str) -> int | None:
    """Size in bytes of the file at `path`; None if there is none, or something else than a regular file.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
