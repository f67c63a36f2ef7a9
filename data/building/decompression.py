"""Compressed files as streams: several behind one another are all read, and damage loses only the rest."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

from data.images.signatures import SIGNATURE, compression

_BLOCK = 2**16  # bytes
_MOST_READS_BEHIND_END = 1000


class Damage(Exception):
    """Bytes that are not what they should be, or a missing end."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Gzip:
    """`zlib` with the interface of `bz2` and `lzma`."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


_DECOMPRESSORS: dict[str | None, Callable[[], _Decompressor]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins with `head` is one that `plain` decompresses."""
    return compression(head) in _DECOMPRESSORS


_ARCHIVES = {
    b"PK\x03\x04": "a zip", b"PK\x05\x06": "a zip", b"Rar!": "a rar", b"7z\xbc\xaf": "a 7z", b"PAR1": "a Parquet file",
}  # fmt: skip


def refuse_unread(head: bytes) -> None:
    """
    Raises:
        Damage: a file that begins with `head` is an archive that is not read.
    """
    what = next((what for start, what in _ARCHIVES.items() if head.startswith(start)), None)
    if (name := compression(head)) is not None and name not in _DECOMPRESSORS:
        what = f"compressed with {name}"
    if what is not None:
        raise Damage(f"{what}, which is not read; unpack it and build from the folder")


def plain(file: BinaryIO) -> BinaryIO:
    """The bytes of a file that is read sequentially, decompressed if it is compressed with gzip, bzip2 or xz.

    Reading raises `Damage` behind what can be decompressed.

    Raises:
        Damage: it is an archive that is not read.
    """
    head = file.read(SIGNATURE)
    refuse_unread(head)
    return cast(BinaryIO, _Stream(head, file, _DECOMPRESSORS.get(compression(head))))


class _Stream(io.RawIOBase):
    def __init__(self, head: bytes, file: BinaryIO, make: Callable[[], _Decompressor] | None) -> None:
        self._ahead, self._file, self._make = head, file, make
        self._decompressor = make() if make else None
        self._reads_behind_end = 0

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer also in the middle; none at the end.

        Raises:
            Damage: it is read far behind its end, as `tarfile` does for a member of a length that no file has.
        """
        data = self._read(size)
        self._reads_behind_end = 0 if data else self._reads_behind_end + 1
        if self._reads_behind_end > _MOST_READS_BEHIND_END:
            raise Damage("it ends inside a member")
        return data

    def _read(self, size: int) -> bytes:
        if self._decompressor is None:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data or self._file.read(size)
        while True:
            if self._decompressor.eof:
                # Padding with zeros is usual behind the end, on tapes and elsewhere.
                self._ahead = self._decompressor.unused_data.lstrip(b"\0")
                while not self._ahead and (block := self._file.read(_BLOCK)):
                    self._ahead = block.lstrip(b"\0")
                if not self._ahead or self._make is None:
                    return b""
                self._decompressor = self._make()
            given = b""
            if self._decompressor.needs_input:
                given, self._ahead = self._ahead or self._file.read(_BLOCK), b""
                if not given:
                    raise Damage("the compressed data ends early")
            try:
                data = self._decompressor.decompress(given, size)
            except (OSError, zlib.error, lzma.LZMAError) as error:
                raise Damage(str(error)) from error
            if data:
                return data
