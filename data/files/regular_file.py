"""Opening regular files only: a pipe or a device in the place of one, as a folder from elsewhere may have it, would be
waited for without end."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from data.limits import RECORD_BYTES


def open_regular(path: str | Path) -> BufferedReader:
    """`open(path, "rb")` of a regular file. Symbolic links to one are followed.

    Raises:
        OSError: it is a pipe, a socket or a device, or cannot be opened.
    """
    return open(path, "rb", opener=_regular)


def read_regular(path: str | Path, limit: int = RECORD_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as for `open_regular`, or it has more than `limit` bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
        return file.read()


def _regular(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # for a folder, `open` raises the usual error
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor
