"""Reading the members of tars of all origins: compressed, two behind one another, without an end mark, with links.

`tarfile` alone takes damage for the end, ends at the first end mark, and forgets the links in what it cannot seek.
"""

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, BinaryIO, NamedTuple, Self, cast

from data.building.decompression import Damage, plain
from data.limits import IMAGE_BYTES
from data.tar import NO_END_MARK, SEVERAL_TARS
from data.tarfile_limits import LimitedInfo, LimitedTar

_MOST_LINKS = 40  # from one to the next, as in Linux

LINK_UPWARDS = "a link to a folder above it"
LOST_LINK = "a link to a missing file"
_UNRESOLVED = "a link in a class tar of a compressed tar; decompress the outer tar"

DAMAGES = (Damage, tarfile.TarError)


class SourceMember(NamedTuple):
    """A member that is not a folder, under its own path or that of a link to it."""

    path: str
    """Without a leading slash and `.`."""
    info: tarfile.TarInfo | None
    """None for a link to nothing in this tar, or to a folder that contains it."""
    archive: tarfile.TarFile
    lost: str = ""
    """Why there is no `info`."""
    content: bytes | None = None
    """If it has been read already, for several links to it."""

    def open(self) -> IO[bytes]:
        """Its content, to be read before the next member."""
        assert self.info is not None
        if self.content is not None:
            return io.BytesIO(self.content)
        file = self.archive.extractfile(self.info)
        assert file is not None
        return file


class _CheckedInfo(LimitedInfo):
    """Makes damage an error, and notes how the archive ends."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) < tarfile.BLOCKSIZE and not buf.strip(b"\0"):
            raise tarfile.EmptyHeaderError("end of file")  # type: ignore[attr-defined]
        return super().frombuf(buf, encoding, errors)

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        archive = cast(_Archive, tarfile_)
        try:
            info = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            archive.is_behind_end = True
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            archive.lacks_end = not archive.is_behind_end
            raise
        except tarfile.HeaderError as error:
            if archive.is_behind_end:
                raise Damage("data that is no tar behind its end mark") from error
            raise Damage(str(error)) from error
        archive.has_several = archive.has_several or archive.is_behind_end
        archive.is_behind_end = False
        return info


class _Archive(LimitedTar):
    is_behind_end = False
    """Whether blocks of zeros were the last to be read."""
    has_several = False
    """Whether another tar follows an end mark."""
    lacks_end = False
    """Whether the file ends behind a member without an end mark."""


@contextmanager
def open_stream(file: BinaryIO, block: int, remark: Callable[[str], None]) -> Iterator[tarfile.TarFile]:
    """A tar, compressed or not, that is read once from front to back, `block` bytes at a time.

    `remark` is called with `NO_END_MARK` or `SEVERAL_TARS` at the end of such a tar.
    """
    with _Archive.open(
        fileobj=plain(file), mode="r|", bufsize=block, tarinfo=_CheckedInfo, ignore_zeros=True
    ) as archive:
        yield archive
        _remark(archive, remark)


@contextmanager
def open_seekable(file: BinaryIO, remark: Callable[[str], None]) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar that is read by seeking from header to header; `remark` as for `open_stream`."""
    with _Archive.open(fileobj=file, mode="r:", tarinfo=_CheckedInfo, ignore_zeros=True) as archive:
        yield archive
        _remark(archive, remark)


def _remark(archive: "_Archive", remark: Callable[[str], None]) -> None:
    if archive.has_several:
        remark(SEVERAL_TARS)
    if archive.lacks_end:
        remark(NO_END_MARK)


def normal(name: str) -> str:
    """The path of a member, relative and without `.`; `..` stays, since it is never resolved."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def members(
    open_tar: Callable[[], AbstractContextManager[tarfile.TarFile]],
    folder: Callable[[str], None] = lambda path: None,
    once: bool = False,
) -> Iterator[SourceMember]:
    """The members of a tar that are not folders; hard and symbolic links become what they point to.

    Links are resolved by reading the tar a second time, so that memory is needed for the links alone; with `once` that
    is not possible, and they count as lost. Folders are passed to `folder`.
    """
    links: dict[str, str | None] = {}
    with open_tar() as archive:
        for info in _all(archive):
            path = normal(info.name)
            if info.isdir() or info.type == b"D":  # D: the list of a folder, in GNU's incremental backups
                folder(path)
            elif info.islnk() or info.issym():
                links[path] = normal(info.linkname) if info.islnk() else _target(path, info.linkname)
            else:
                yield SourceMember(path, info, archive)
        if once:
            for path in links:
                yield SourceMember(path, None, archive, _UNRESOLVED)
            return
    if not links:
        return
    aliases: dict[str, list[str]] = {}
    resolved = {path: _resolved(path, links) for path in links}
    for path, target in resolved.items():
        if target is not None:
            aliases.setdefault(target, []).append(path)
    upwards = {path for path, target in resolved.items() if target is not None and _contains(target, path)}
    for path in list(resolved):  # links inside a folder that is linked as well
        for above in _folders(path):
            for alias in aliases.get(above, ()):
                target = resolved[path]
                if alias not in upwards and target is not None:
                    aliases.setdefault(target, []).append(alias + path[len(above) :])
    found: set[str] = set(upwards)
    with open_tar() as archive:
        for path in sorted(upwards):
            yield SourceMember(path, None, archive, LINK_UPWARDS)
        for info in _all(archive):
            if info.isdir() or info.islnk() or info.issym():
                found.update(aliases.get(normal(info.name), ()) if info.isdir() else ())
                continue
            path = normal(info.name)
            names = {
                alias + path[len(above) :]: alias
                for above in (path, *_folders(path))
                for alias in aliases.get(above, ())
                if alias not in upwards
            }
            found.update(names.values())
            is_kept = len(names) > 1 and info.isreg() and info.size <= IMAGE_BYTES
            content = SourceMember(path, info, archive).open().read() if is_kept else None
            for name in names:
                yield SourceMember(name, info, archive, content=content)
        for path in links:
            if path not in found:
                yield SourceMember(path, None, archive, LOST_LINK)


def _all(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would accumulate millions
        yield info


def _folders(path: str) -> Iterator[str]:
    """The folders that contain a path, the root last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _contains(folder: str, path: str) -> bool:
    return folder in _folders(path)


def _target(path: str, linkname: str) -> str | None:
    """The path that a symbolic link points to; None if it is outside."""
    if linkname.startswith("/"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), linkname))
    return None if target.split("/")[0] == ".." else "" if target == "." else target


def _resolved(path: str, links: dict[str, str | None]) -> str | None:
    """Where a chain of links ends; None if it does not, or ends outside."""
    for _ in range(_MOST_LINKS):
        link = next((above for above in (path, *_folders(path)) if above in links), None)
        if link is None:
            return path
        target = links[link]
        if target is None:
            return None
        path = target + path[len(link) :] if target else path[len(link) + 1 :]
    return None
