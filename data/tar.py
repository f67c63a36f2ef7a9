"""Locating the members of a tar by its headers.

Every rank does this for every shard it opens. `tarfile` takes five times as long (`python -m benchmarks.reading`),
which with eight ranks on a node approaches the cost of decoding. The tests compare the results with those of `tarfile`.
"""

import os
import posixpath
from typing import NamedTuple

import numpy as np

from data.limits import HEADER_BYTES, MEMBERS, NAME_BYTES

BLOCK = 512
_MOST_DIGITS = 24  # of a number in a pax record
_LONGEST_PADDING = 2**22
"""Bytes of zeros at the end beyond which a tar was preallocated and not written, or downloaded, to its end."""
_PIECE = 2**16  # bytes
_CHECKED_AT_ONCE = 2**14  # headers

_OTHER_KINDS = {
    ord("3"): "devices", ord("4"): "devices", ord("5"): "folders", ord("6"): "named pipes", ord("D"): "folders",
    ord("M"): "rests of files of another volume", ord("S"): "sparse files (make the tar without --sparse)",
    ord("V"): "volume labels",
}  # fmt: skip
_SPARSE, _FOLDER = _OTHER_KINDS[ord("S")], _OTHER_KINDS[ord("5")]
_DANGLING = "links to nothing in the tar"

COMPRESSED_TAR_EXTENSIONS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Of tars that can be read from front to back only."""
UNREAD_TAR_EXTENSIONS = (".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".tar.z")
"""Of tars that are not read at all."""
NO_END_MARK = "no_end_mark"
SEVERAL_TARS = "several_tars"
"""Kinds of remarks on tars that are whole."""


class Member(NamedTuple):
    """One regular file in a tar: its name, and offset and size of its content, which for links is their target's."""

    name: str
    offset: int
    size: int


class TarContents(NamedTuple):
    """What is in a tar."""

    members: list[Member]
    """Regular files, and links to them."""
    others: list[tuple[str, str]]
    """Name and kind, in the plural, of every other entry, such as folders and links to nothing."""
    damage: str | None
    """None if the tar is whole."""
    has_end: bool
    """Whether the end mark is there; without it the tar may have been truncated between two members."""
    archives: int
    """Tars behind one another, as `cat` and `tar --concatenate` leave them."""


def read_tar(descriptor: int) -> TarContents:
    """The contents of the uncompressed tar open as `descriptor`.

    Reads ustar, GNU and pax headers and verifies their checksums; of a damaged tar it returns what is before the
    damage. What follows an end mark is read as by `tar --ignore-zeros`.
    """
    length = os.fstat(descriptor).st_size
    if length == 0:
        return TarContents([], [], "an empty file", False, 0)
    reading = _Reading(descriptor, length)
    damage = reading.follow()
    damage = reading.check() or damage
    others = reading.resolve_links()
    return TarContents(reading.members, others, damage, reading.has_end, reading.archives)


class _Reading:
    """The state of reading a tar from header to header."""

    def __init__(self, descriptor: int, length: int) -> None:
        self.members: list[Member] = []
        self.positions: list[int] = []
        self.has_end = False
        self.archives = 1
        self._descriptor = descriptor
        self._length = length
        self._headers: list[bytes] = []
        """Those that are yet to be checked, which is faster for many at once."""
        # Each begins with the number of the header.
        self._links: list[tuple[int, int, str]] = []  # with the place in `members`, and the target
        self._others: list[tuple[int, str, str]] = []

    def follow(self) -> str | None:
        """Read all headers up to the end or the first that cannot be one, which is the damage."""
        descriptor, length = self._descriptor, self._length
        found, headers, positions = self.members, self._headers, self.positions
        extended: dict[bytes, bytes] = {}
        position = 0
        while True:
            # Not a memory map: truncating a mapped file kills the process.
            header = os.pread(descriptor, BLOCK, position)
            if len(header) < BLOCK:
                if positions and not extended and not header.strip(b"\0"):
                    return None  # whole members without an end mark
                return f"ends after {length:,} bytes without an end mark"
            kind = header[156]
            if kind == 0 and header[0] == 0 and not header.strip(b"\0"):
                behind = self._behind_zeros(position)
                if isinstance(behind, str) or behind == length:
                    self.has_end = True
                    return behind if isinstance(behind, str) else None
                self.archives += 1
                position, extended = behind, {}
                continue
            try:
                # GNU tar leaves the size of a volume label empty.
                size = _size(header[124:136]) if kind not in b"123456V" else 0
            except ValueError:
                return f"no tar header at byte {position:,}"
            content = position + BLOCK
            if kind == ord("S"):
                content = self._behind_sparse_map(header, content)
            if extended and kind not in b"xXLKg" and b"size" in extended and kind not in b"123456V":
                size = int(extended[b"size"])  # of few digits, see `_pax_records`
            if content + size > length:
                return f"ends after {length:,} bytes, inside a member of {size:,}"
            if kind in b"xXLK":
                if size > HEADER_BYTES:
                    what = "a name" if kind in b"LK" else "pax records"
                    return f"{what} of {size:,} bytes at byte {position:,}; at most {HEADER_BYTES:,} are read"
                records = os.pread(descriptor, size, content)
                if kind in b"LK":
                    extended[b"path" if kind == ord("L") else b"linkpath"] = records.rstrip(b"\0")
                else:
                    pax = _pax_records(records)
                    if pax is None:
                        return f"no pax records at byte {content:,}"
                    extended |= pax
            elif kind != ord("g"):
                encoded = extended.get(b"path") or _name(header)
                if len(encoded) > NAME_BYTES:
                    return f"a name of {len(encoded):,} bytes at byte {position:,}; at most {NAME_BYTES:,} are read"
                name = encoded.decode("utf-8", "surrogateescape")
                if kind in b"0\0007" and not any(key.startswith(b"GNU.sparse.") for key in extended):
                    if kind == 0 and name.endswith("/"):  # as old writers mark folders
                        self._others.append((len(positions), name, _FOLDER))
                    else:
                        found.append(Member(name, content, size))
                else:
                    self._add_other(kind, name, extended, header)
                if extended:
                    extended = {}
            headers.append(header)
            positions.append(position)
            if len(headers) == _CHECKED_AT_ONCE and (damage := self.check()):
                return damage
            if len(positions) > 2 * MEMBERS:  # some have a header for a long name
                return f"more than {MEMBERS:,} members; divide it into several tars"
            position = content + -(-size // BLOCK) * BLOCK

    def check(self) -> str | None:
        """Verify the checksums of the headers read since the last call. The damage, from which on all is dropped."""
        valid, first = _valid_headers(self._headers), len(self.positions) - len(self._headers)
        damaged = valid < len(self._headers)
        self._headers.clear()
        if not damaged:
            return None
        damage = f"no tar header at byte {self.positions[first + valid]:,}"
        self._cut(first + valid)
        return damage

    def _add_other(self, kind: int, name: str, extended: dict[bytes, bytes], header: bytes) -> None:
        number = len(self.positions)
        if kind in b"12":
            target = (extended.get(b"linkpath") or header[157:257].partition(b"\0")[0]).decode(
                "utf-8", "surrogateescape"
            )
            if kind == ord("2"):
                target = posixpath.join(posixpath.dirname(name), target)
            self._links.append((number, len(self.members), posixpath.normpath(target)))
            self.members.append(Member(name, -1, 0))
        elif kind in b"0\0007":
            real = extended.get(b"GNU.sparse.name")
            self._others.append((number, real.decode("utf-8", "surrogateescape") if real else name, _SPARSE))
        else:
            self._others.append((number, name, _OTHER_KINDS.get(kind, "entries of an unknown kind")))

    def _behind_zeros(self, position: int) -> int | str:
        """Where the next archive begins behind the zeros at `position`, the length of the file if there is none; or
        the damage.
        """
        start = position
        while piece := os.pread(self._descriptor, _PIECE, position):
            remaining = len(piece.lstrip(b"\0"))
            if remaining:
                position += (len(piece) - remaining) // BLOCK * BLOCK
                if _valid_headers([os.pread(self._descriptor, BLOCK, position).ljust(BLOCK, b"\0")]):
                    return position
                return (
                    f"bytes that are no tar follow its end mark at byte {position:,}; if they may go: truncate --size "
                    f"{position}"
                )
            position += len(piece)
        if position - start > _LONGEST_PADDING:
            return f"{position - start:,} bytes of zeros at its end, as an interrupted download leaves them"
        return self._length

    def _behind_sparse_map(self, header: bytes, content: int) -> int:
        more = header[482]
        while more:
            block = os.pread(self._descriptor, BLOCK, content)
            more = block[504] if len(block) == BLOCK else 0
            content += BLOCK
        return content

    def _cut(self, headers: int) -> None:
        """Keep only what the first `headers` headers describe."""
        numbers = {place: number for number, place, _ in self._links}
        end = self.positions[headers]
        self.members = [
            member
            for place, member in enumerate(self.members)
            if (numbers[place] < headers if place in numbers else member.offset <= end)
        ]
        self._links = [link for link in self._links if link[0] < headers]
        self._others = [other for other in self._others if other[0] < headers]

    def resolve_links(self) -> list[tuple[str, str]]:
        """Give links the content of their targets; those without one are removed. The others in their order."""
        if self._links:
            places = {posixpath.normpath(member.name): place for place, member in enumerate(self.members)}
            targets = {place: places.get(target) for _, place, target in self._links}
            for number, place, _ in self._links:
                passed: list[int] = []
                target: int | None = place
                while target is not None and target in targets:
                    passed.append(target)
                    # A link that is met again on its own way leads to nothing.
                    following = targets[target]
                    targets[target] = None
                    target = following
                for link in passed:  # so that chains of links take no longer than their length
                    targets[link] = target
                name = self.members[place].name
                if target is None:
                    self._others.append((number, name, _DANGLING))
                else:
                    self.members[place] = Member(name, *self.members[target][1:])
            self.members = [member for member in self.members if member.offset >= 0]
            self._others.sort()
        return [(name, kind) for _, name, kind in self._others]


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
    content = content.rstrip(b"\0")
    at = 0
    while at < len(content):
        digits = content[at : at + _MOST_DIGITS].partition(b" ")[0]
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(content) - at:
            return None
        key, _, value = content[at + len(digits) + 1 : at + int(digits)].removesuffix(b"\n").partition(b"=")
        records[key] = value
        at += int(digits)
    size = records.get(b"size", b"0")
    return records if size.isdigit() and len(size) <= _MOST_DIGITS else None


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
