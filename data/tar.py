"""Where the members of a tar lie, from its headers alone.

Every rank asks this of every shard it opens. `tarfile` takes five times as long (`python -m benchmarks.reading`), which
with eight ranks on a node comes near to the cost of decoding; the tests hold this against `tarfile`.
"""

import mmap
import os
from typing import NamedTuple

import numpy as np

BLOCK = 512
_MAGIC, _POSIX = slice(257, 262), b"ustar\x0000"


class Member(NamedTuple):
    """One regular file of a tar: its name, and where in the tar its content is."""

    name: str
    offset: int
    size: int


def members(descriptor: int) -> tuple[list[Member], str | None]:
    """The regular files of the uncompressed tar open as `descriptor`, and what is wrong with it, None if nothing.

    Reads ustar, GNU and pax headers and verifies their checksums; of a damaged tar it gives the files before the
    damage.
    """
    length = os.fstat(descriptor).st_size
    if length == 0:
        return [], "an empty file"
    with mmap.mmap(descriptor, length, prot=mmap.PROT_READ) as tar:
        found, positions, damage = _follow(tar, length)
        whole = _whole_headers(tar, positions)
    if whole < len(positions):
        damage = f"no tar header at byte {positions[whole]:,}"
        found = [member for member in found if member.offset <= positions[whole]]
    return found, damage


def _follow(tar: mmap.mmap, length: int) -> tuple[list[Member], list[int], str | None]:
    """Files and the positions of all headers, up to the end mark or to what cannot be followed."""
    found: list[Member] = []
    positions: list[int] = []
    long_name: bytes | None = None
    long_size: int | None = None
    position = 0
    while True:
        if position + BLOCK > length:
            return found, positions, f"ends after {length:,} bytes without an end mark"
        kind = tar[position + 156]
        if kind == 0 and tar[position] == 0 and not tar[position : position + BLOCK].strip(b"\0"):
            return found, positions, None
        try:
            size = _size(tar[position + 124 : position + 136]) if kind not in b"123456" else 0
        except ValueError:
            return found, positions, f"no tar header at byte {position:,}"
        content = position + BLOCK
        if kind in b"xL":
            positions.append(position)
            extended = tar[content : min(content + size, length)]
            if kind == ord("L"):
                long_name = extended.rstrip(b"\0")
            else:
                pax = _pax_records(extended)
                if pax is None:
                    return found, positions, f"no pax records at byte {content:,}"
                long_name = pax.get(b"path", long_name)
                long_size = int(pax[b"size"]) if b"size" in pax else long_size
        else:
            size = size if long_size is None else long_size
            if content + size > length:
                return found, positions, f"ends after {length:,} bytes, inside a member of {size:,}"
            positions.append(position)
            if kind in b"0\0007":  # regular, regular of old writers, contiguous
                name = long_name or _name(tar, position)
                found.append(Member(name.decode("utf-8", "surrogateescape"), content, size))
            if kind not in b"gK":
                long_name = long_size = None
        position = content + -(-size // BLOCK) * BLOCK


def _size(field: bytes) -> int:
    # Above 8 GiB: a binary number with the top bit set.
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():  # int() would take signs and underscores as well
        raise ValueError(field)
    return int(digits, 8)


def _name(tar: mmap.mmap, position: int) -> bytes:
    name = tar[position : position + 100].partition(b"\0")[0]
    # GNU's headers use the room of ustar's prefix for something else.
    if tar[position + 345] and tar[position + 257 : position + 265] == _POSIX:
        return tar[position + 345 : position + 500].partition(b"\0")[0] + b"/" + name
    return name


def _pax_records(content: bytes) -> dict[bytes, bytes] | None:
    """`<length> <key>=<value>\\n` over and over; None if it is not."""
    records: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        digits, _, rest = content.partition(b" ")
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(content):
            return None
        key, _, value = rest[: int(digits) - len(digits) - 1].removesuffix(b"\n").partition(b"=")
        records[key] = value
        content = content[int(digits) :]
    return records if records.get(b"size", b"0").isdigit() else None


def _whole_headers(tar: mmap.mmap, positions: list[int]) -> int:
    """How many of the headers, from the first, fit their checksums."""
    if not positions:
        return 0
    view = np.frombuffer(tar, np.uint8)
    headers = np.lib.stride_tricks.sliding_window_view(view, BLOCK)[positions]
    del view  # or the map cannot be closed
    # The checksum field itself counts as eight spaces.
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    for number, (field, expected) in enumerate(zip(headers[:, 148:156], sums.tolist(), strict=True)):
        try:
            if _octal(field.tobytes()) != expected:
                return number
        except ValueError:
            return number
    return len(positions)
