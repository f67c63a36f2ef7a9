"""Tars as sources: tars of class tars and tars of images, never unpacked; their names are never used as paths."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Self, cast

from data.building.source import BrokenInput, ClassTar, ImageFile, Source, SourceImage, SourceItem, is_image
from data.errors import DataError
from data.label_files import LabelFile
from data.remote_file import open_file
from data.storage import Storage, file_size, is_remote, read_bytes

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 2**20  # bytes that tarfile reads at a time
_INNER_BLOCK = 2**14  # in a nested tar; if it is truncated, at most this much before its end is lost


class _Damage(Exception):
    """An invalid header, or a missing end."""


class _CheckedMember(tarfile.TarInfo):
    """Makes damage an error: tarfile takes a damaged header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.HeaderError as error:
            raise _Damage(str(error)) from error


_DAMAGES = (_Damage, tarfile.TarError)


@dataclass(frozen=True, slots=True)
class _Naming:
    """Names and classes of the images of a tar, from their member names."""

    location: str
    labels: LabelFile | None
    within: str | None
    parents: dict[str, str]
    """Class folder -> the folder it was found in."""

    def includes(self, member: str) -> bool:
        folder = self.within
        return folder is None or PurePosixPath(member).is_relative_to(PurePosixPath(folder))

    def image(self, member: str) -> tuple[str, tuple[str, ...]]:
        path = PurePosixPath(member)
        if self.labels is not None:
            return path.name, self.labels.of(path.name) if self.labels.by_name else ()
        class_name, above = path.parent.name, str(path.parent.parent)
        if not class_name:
            raise DataError(
                f"{self.location}: image {member} is not in a class folder; provide the labels with --labels FILE"
            )
        if self.parents.setdefault(class_name, above) != above:
            raise DataError(
                f"{self.location}: class folder {class_name} is both in {self.parents[class_name]} and in {above}; "
                f"select one of them with --within {above}"
            )
        return f"{class_name}/{path.name}", (class_name,)


def open_tar(location: str, storage: Storage, labels: LabelFile | None, within: str | None) -> Source:
    """The images of a tar.

    Uncompressed tars are listed by seeking from header to header, so that workers read disjoint parts of them; others
    are read once, sequentially.

    Raises:
        DataError: it is not a tar, has no images, or the labels do not match.
    """
    size = file_size(location, storage)
    compressed = read_bytes(location, storage, 0, min(6, size)).startswith(_COMPRESSED)
    naming = _Naming(location, labels, within, {})
    by_position = labels is not None and bool(labels.in_order)
    if compressed and by_position:
        raise DataError(
            f"{location}: labels without names cannot be used with a compressed tar; write lines of NAME LABEL"
        )
    # A seek costs a request, which pays off for a class but not for an image.
    if compressed or (is_remote(location) and not by_position and not _begins_with_tar(location, storage)):
        return Source(location, lambda: _streamed(naming, size, storage), bytes=size, divisible=False)
    items = list(_listed(naming, size, storage))
    if labels is not None:
        images = {item.content.name for item in items if isinstance(item.content, ImageFile)}
        classes = labels.assign(images)
        items = [
            SourceItem(ImageFile(c.name, classes[c.name], c.location, c.start, c.stop), item.bytes, item.share)
            if isinstance(c := item.content, ImageFile)
            else item
            for item in items
        ]
    if not any(isinstance(item.content, ClassTar | ImageFile) for item in items):
        inside = f" within {within}" if within else ""
        raise DataError(f"{location}: no class tars and no images in it{inside}; give a tar that has them")
    return Source(location, lambda: iter(items), bytes=size)


def class_tar_images(tar: ClassTar, storage: Storage) -> Iterator[SourceImage | BrokenInput]:
    """The images of a class tar, in its order, and finally what is lost if it is damaged."""
    with open_file(tar.location, storage) as file:
        window = _Window(file, tar.start, tar.stop)
        yield from _images_of(cast(BinaryIO, window), tar.class_name, tar.location)


def _images_of(file: BinaryIO, class_name: str, location: str) -> Iterator[SourceImage | BrokenInput]:
    name, last, count = f"{location}: {class_name}.tar", "", 0
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=_INNER_BLOCK, tarinfo=_CheckedMember) as archive:
            for member in _members(archive):
                if is_image(member.name):
                    last = member.name
                    image_name = f"{class_name}/{PurePosixPath(member.name).name}"
                    yield SourceImage(image_name, (class_name,), _data(archive, member))
                    count += 1
    except _DAMAGES as error:
        where = f"at or after {last}" if last else "at its beginning"
        yield BrokenInput(name, f"damaged {where} ({error})", is_tar=True)
        return
    if count == 0:
        yield BrokenInput(name, "no image in it", is_tar=True)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would accumulate millions
        if member.isfile():
            yield member


def _data(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _begins_with_tar(location: str, storage: Storage) -> bool:
    with open_file(location, storage) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|", tarinfo=_CheckedMember) as archive:
                return next(_members(archive)).name.endswith(".tar")
        except (*_DAMAGES, StopIteration):
            return False


def _listed(naming: _Naming, size: int, storage: Storage) -> Iterator[SourceItem]:
    """Locations of the class tars and images of an uncompressed tar; finally its damage, if any."""
    location, last = naming.location, ""
    with open_file(location, storage) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_CheckedMember) as archive:
                for member in _members(archive):
                    last, start, stop = member.name, member.offset_data, member.offset_data + member.size
                    if not naming.includes(member.name):
                        continue
                    share = member.size / size
                    if member.name.endswith(".tar"):
                        class_name = PurePosixPath(member.name).stem
                        yield SourceItem(ClassTar(class_name, location, start, stop), member.size, share)
                    elif is_image(member.name):
                        name, classes = naming.image(member.name)
                        yield SourceItem(ImageFile(name, classes, location, start, stop), member.size, share)
        except _DAMAGES as error:
            yield SourceItem(_lost(location, last, error), 0, 0.0)


def _streamed(naming: _Naming, size: int, storage: Storage) -> Iterator[SourceItem]:
    """The images of a tar, compressed or not, read sequentially."""
    location, last, names = naming.location, "", set[str]()
    before = 0
    with open_file(location, storage) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*", bufsize=_BLOCK, tarinfo=_CheckedMember) as archive:
                for member in _members(archive):
                    last = member.name
                    if not naming.includes(member.name):
                        continue
                    contents: Iterator[SourceImage | BrokenInput] = iter(())
                    if member.name.endswith(".tar"):
                        inner = archive.extractfile(member)
                        assert inner is not None
                        contents = _images_of(cast(BinaryIO, inner), PurePosixPath(member.name).stem, location)
                    elif is_image(member.name):
                        name, classes = naming.image(member.name)
                        if naming.labels is not None:
                            names.add(name)
                        contents = iter([SourceImage(name, classes, _data(archive, member))])
                    for content in contents:
                        now = file.tell()
                        length = len(content.encoded) if isinstance(content, SourceImage) else 0
                        yield SourceItem(content, length, (now - before) / size)
                        before = now
        except _DAMAGES as error:
            yield SourceItem(_lost(location, last, error), 0, 0.0)
            return
    if naming.labels is not None:
        naming.labels.refuse_unknown(names)


def _lost(location: str, last: str, error: Exception) -> BrokenInput:
    if not last:
        raise DataError(f"{location}: not a folder, not a list and not a readable tar ({error})") from error
    return BrokenInput(location, f"damaged after its member {last} ({error})", is_tar=True)


class _Window(io.RawIOBase):
    """The bytes `start` .. `stop` of a file, read sequentially."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        self._file, self._left = file, stop - start

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
