"""Locating the members of a tar by its headers.

Every rank does this for every shard it opens. `tarfile` takes five times as long (`python -m benchmarks.reading`),
which with eight ranks on a node approaches the cost of decoding. The tests compare the results with those of `tarfile`.
"""

import os
from typing import NamedTuple

import numpy as np

BLOCK = 512
_LONGEST_NAME = 2**20  # of a name, or of all pax records of a member


class Member(NamedTuple):
    """One regular file in a tar: its name, and offset and size of its content."""

    name: str
    offset: int
    size: int


def members(descriptor: int) -> tuple[list[Member], str | None]:
    """The regular files in the uncompressed tar open as `descriptor`, and its damage, None if there is none.

    Reads ustar, GNU and pax headers and verifies their checksums; for a damaged tar it returns the files before the
    damage.
    """
    length = os.fstat(descriptor).st_size
    if length == 0:
        return [], "an empty file"
    found, headers, positions, damage = _follow(descriptor, length)
    valid = _valid_headers(headers)
    if valid < len(positions):
        damage = f"no tar header at byte {positions[valid]:,}"
        found = [member for member in found if member.offset <= positions[valid]]
    return found, damage


def _follow(descriptor: int, length: int) -> tuple[list[Member], list[bytes], list[int], str | None]:
    """Files, and all headers with their positions, up to the end mark or the first invalid header; and the damage."""
    found: list[Member] = []
    headers: list[bytes] = []
    positions: list[int] = []
    long_name: bytes | None = None
    long_size: int | None = None
    position = 0
    while True:
        # Not a memory map: truncating a mapped file kills the process.
        header = os.pread(descriptor, BLOCK, position)
        if len(header) < BLOCK:
            return found, headers, positions, f"ends after {length:,} bytes without an end mark"
        kind = header[156]
        if kind == 0 and header[0] == 0 and not header.strip(b"\0"):
            return found, headers, positions, None
        try:
            size = _size(header[124:136]) if kind not in b"123456" else 0
        except ValueError:
            return found, headers, positions, f"no tar header at byte {position:,}"
        content = position + BLOCK
        if kind not in b"xL" and long_size is not None:
            size = long_size
        if content + size > length:
            return found, headers, positions, f"ends after {length:,} bytes, inside a member of {size:,}"
        if kind in b"xL":
            extended = os.pread(descriptor, min(size, _LONGEST_NAME), content)
            if kind == ord("L"):
                long_name = extended.rstrip(b"\0")
            else:
                pax = _pax_records(extended)
                if pax is None:
                    return found, headers, positions, f"no pax records at byte {content:,}"
                long_name = pax.get(b"path", long_name)
                long_size = int(pax[b"size"]) if b"size" in pax else long_size
        else:
            if kind in b"0\0007":  # regular, regular of old writers, contiguous
                name = long_name or _name(header)
                found.append(Member(name.decode("utf-8", "surrogateescape"), content, size))
            if kind not in b"gK":
                long_name = long_size = None
        headers.append(header)
        positions.append(position)
        position = content + -(-size // BLOCK) * BLOCK


def _size(field: bytes) -> int:
    # Above 8 GiB: a binary number with the top bit set.
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():  # int() would take signs and underscores as well
        raise ValueError(field)
    return int(digits, 8)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU headers use the bytes of the ustar prefix for something else.
    if header[345] and header[257:265] == b"ustar\x0000":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax_records(content: bytes) -> dict[bytes, bytes] | None:
    """A sequence of `<length> <key>=<value>\\n`; None if it is malformed."""
    records: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        digits, _, rest = content.partition(b" ")
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(content):
            return None
        key, _, value = rest[: int(digits) - len(digits) - 1].removesuffix(b"\n").partition(b"=")
        records[key] = value
        content = content[int(digits) :]
    return records if records.get(b"size", b"0").isdigit() else None


def _valid_headers(headers: list[bytes]) -> int:
    """The number of headers, from the first, whose checksums are correct."""
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    # The checksum field itself counts as eight spaces.
    sums = blocks.sum(axis=1, dtype=np.int64) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    for number, (header, expected) in enumerate(zip(headers, sums.tolist(), strict=True)):
        try:
            if _octal(header[148:156]) != expected:
                return number
        except ValueError:
            return number
    return len(headers)
