"""Python's `tarfile` within limits. As it is, a header may make it read gigabytes for a name, call itself without end,
or go back to where it was.
"""

import tarfile
from typing import IO, BinaryIO, Self

from data.limits import HEADER_BYTES

_EXTENSIONS = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X"}
_UNEXPECTED = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


class LimitedInfo(tarfile.TarInfo):
    """The header of a member; what is wrong with it is a `tarfile.TarError`."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENSIONS and info.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a name or pax records of {info.size:,} bytes; at most {HEADER_BYTES:,} are read")
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            info = super().fromtarfile(tarfile_)
        except RecursionError:
            raise tarfile.ReadError("hundreds of headers of one member") from None
        except _UNEXPECTED as error:
            raise tarfile.ReadError(f"a damaged header ({str(error)[:40]})") from error
        if info.size < 0:
            raise tarfile.ReadError(f"a member of {info.size:,} bytes")
        return info


class LimitedTar(tarfile.TarFile):
    """A tar that is being read; what is wrong with it is a `tarfile.TarError`."""

    tarinfo = LimitedInfo

    def next(self) -> tarfile.TarInfo | None:
        try:
            return super().next()
        except _UNEXPECTED as error:  # such as a place that no file can have
            raise tarfile.ReadError(f"a damaged header ({str(error)[:40]})") from error

    def extractfile(self, member: str | tarfile.TarInfo) -> IO[bytes] | None:
        try:
            return super().extractfile(member)
        except (LookupError, RecursionError):
            raise tarfile.ReadError("a link to nothing, or to itself") from None


def open_limited(file: BinaryIO) -> LimitedTar:
    """An uncompressed tar, read by seeking from header to header.

    Raises:
        tarfile.TarError: it is none; also while its members are read.
    """
    return LimitedTar.open(fileobj=file, mode="r:")
