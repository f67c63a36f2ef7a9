"""Files with one JSON object on a line, to which several processes append, also while a disk is full."""

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.remote.web_address import without_secrets

log = logging.getLogger(__name__)


def append_json_line(path: Path, entry: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append `entry` to the file at `path`, on a line of its own even if the line before was cut short.

    Signatures and logins in addresses are left out.

    With `sync`, it is on the disk when this returns.

    Raises:
        OSError: it could not be written, or only in part.
    """
    line = (without_secrets(json.dumps(entry)) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if _is_cut(file):
            line = b"\n" + line
        # One call, so that processes do not write into each other's lines and a kill leaves no partial one.
        written = os.write(file, line)
        if written < len(line):
            # What fits is there; the rest fails, with the reason.
            os.write(file, line[written:])
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


@functools.cache
def note_skipped(path: Path, numbers: tuple[int, ...]) -> None:
    """Say once that lines of the file at `path`, with these numbers from 1, were skipped."""
    which = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    lines = f"line {which} is" if len(numbers) == 1 else f"{len(numbers):,} lines ({which}) are"
    log.warning("%s: %s cut short or no entry, and skipped", path, lines)


def _is_cut(file: int) -> bool:
    """Whether the last line has no end."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"
