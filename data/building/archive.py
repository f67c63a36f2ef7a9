"""Tars as sources: tars of class tars and tars of images, never unpacked; their names are never used as paths."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from tarfile import TarFile
from typing import IO, BinaryIO, cast

from data.accounting import Accounting
from data.building.class_folders import BESIDE, ClassFolders, Selection
from data.building.decompression import is_compressed
from data.building.formats import HEAD, TAR_EXTENSIONS, NotTaken, Use, use_of
from data.building.keys import readable
from data.building.source import BrokenInput, ClassTar, ImageFile, Source, SourceImage, SourceItem
from data.building.tar_members import (
    DAMAGES,
    LINK_UPWARDS,
    NO_END_MARK,
    SEVERAL_TARS,
    Member,
    members,
    normal,
    open_seekable,
    open_stream,
)
from data.errors import DataError
from data.label_files import LabelFile
from data.remote_file import open_file
from data.storage import Storage, file_size, is_remote, read_bytes

_BLOCK = 2**20  # bytes that are read at a time
_INNER_BLOCK = 2**14  # in a nested tar; if it is truncated, at most this much before its end is lost
_ENDS = {NO_END_MARK: "without an end mark", SEVERAL_TARS: "of several tars behind one another"}
_NUMBERED = re.compile(r".*[-_.]\d{3,}")  # how shards are named
_LABELS = {"json", "txt"}  # extensions of what says of an image what it shows


@dataclass
class _TarSource:
    """A tar and what is known of it."""

    location: str
    storage: Storage
    size: int
    labels: LabelFile | None
    folders: ClassFolders
    accounting: Accounting = field(default_factory=lambda: Accounting("members"))

    @property
    def within(self) -> str:
        return normal(self.folders.selection.within or "")

    def remark(self, kind: str) -> None:
        more = "if it was copied, compare its size" if kind == NO_END_MARK else "all of them are read"
        self.accounting.remark(kind, f"{self.location}: a tar {_ENDS[kind]}; {more}")

    def folder(self, member: str) -> None:
        if (path := self._inside(member)) is not None:
            self.folders.add_folder(path)

    def path(self, member: str) -> str:
        """The path of a member that may be taken, relative to the selected folder.

        Raises:
            NotTaken: it is elsewhere, or left out because of its path.
        """
        path = self._inside(member)
        if path is None:
            raise NotTaken(f"outside of --within {self.folders.selection.within}")
        self.folders.add_folder(path.rpartition("/")[0])
        if reason := self.folders.selection.reason(path):
            raise NotTaken(reason)
        return path

    def image(self, path: str) -> tuple[str, tuple[str, ...]]:
        """Name and classes of an image."""
        folder, _, name = path.rpartition("/")
        if not folder and not self.folders.flat:
            raise NotTaken(BESIDE)
        class_name, prefix = self.folders.class_of(folder)
        if self.labels is not None:
            return name, self.labels.of(name) if self.labels.by_name else ()
        return prefix + name, (class_name,)

    def _inside(self, member: str) -> str | None:
        if not self.within:
            return member
        return member[len(self.within) + 1 :] if member.startswith(f"{self.within}/") else None


def open_tar(location: str, storage: Storage, labels: LabelFile | None, selection: Selection) -> Source:
    """The images of a tar.

    Uncompressed tars are listed by seeking from header to header, so that workers read disjoint parts of them; others
    are read once, sequentially.

    Raises:
        DataError: it is not a tar, has no images, its folders can be read in two ways, or the labels do not match.
    """
    size = file_size(location, storage)
    compressed = is_compressed(read_bytes(location, storage, 0, min(6, size)))
    folders = ClassFolders(location, selection, is_tar=True, flat=labels is not None)
    tar = _TarSource(location, storage, size, labels, folders)
    by_position = labels is not None and bool(labels.in_order)
    if compressed and by_position:
        raise DataError(
            f"{location}: labels without names cannot be used with a compressed tar; write lines of NAME LABEL"
        )
    # A seek costs a request, which pays off for a class but not for an image.
    if compressed or (is_remote(location) and not by_position and not _begins_with_tar(location, storage)):
        folders.read_once = True
        return Source(location, lambda: _streamed(tar), tar.accounting, bytes=size, divisible=False)
    items = list(_listed(tar))
    tar.folders.finish(tar.accounting)
    if labels is not None:
        images = [item.content.name for item in items if isinstance(item.content, ImageFile | SourceImage)]
        classes = labels.assign(images)
        items = [
            item._replace(content=replace(content, classes=classes[content.name]))
            if isinstance(content := item.content, ImageFile | SourceImage)
            else item
            for item in items
        ]
    if all(isinstance(item.content, BrokenInput) for item in items):
        raise _nothing_in(tar)
    return Source(location, lambda: iter(items), tar.accounting, bytes=size)


def class_tar_images(
    tar: ClassTar, storage: Storage, selection: Selection, accounting: Accounting
) -> Iterator[SourceImage | BrokenInput]:
    """The images of a class tar, in its order, and what is lost if it is damaged.

    The tar and its members are counted in `accounting`, except that what is yielded is only counted as found.

    Raises:
        DataError: it is not the tar of one class.
    """
    with open_file(tar.location, storage) as file:

        def begin() -> BinaryIO:
            return cast(BinaryIO, _Window(file, tar.start, tar.stop))

        yield from _images_of(tar, begin, selection, accounting)


def _images_of(
    tar: ClassTar, begin: Callable[[], BinaryIO], selection: Selection, accounting: Accounting, once: bool = False
) -> Iterator[SourceImage | BrokenInput]:
    inside = _ClassTarMembers(tar, selection)
    last, count = "", 0

    ends = set[str]()
    try:
        for member in members(lambda: open_stream(begin(), _INNER_BLOCK, ends.add), once=once):
            last = member.path
            image: SourceImage | BrokenInput | None = None
            try:
                image = inside.image(member)
            except NotTaken as reason:
                accounting.leave_out(str(reason), readable(f"{tar.path}/{member.path}"))
            except _Lost as reason:
                image = BrokenInput(tar.prefix + member.path, str(reason))
            accounting.found += 1
            if image is not None:
                count += 1
                yield image
    except DAMAGES as error:
        where = f"at or after {last}" if last else "at its beginning"
        yield BrokenInput(f"{tar.location}: {tar.path}", f"damaged {where} ({error})", is_tar=True)
        return
    if count:
        accounting.take("class tars" + "".join(f" {_ENDS[kind]}" for kind in sorted(ends)))
    else:
        accounting.leave_out("a class tar without images", readable(tar.path))


class _Lost(Exception):
    """An image of a tar that is not in it; the message is the reason."""


@dataclass
class _ClassTarMembers:
    """The members of a class tar, of which some are images."""

    tar: ClassTar
    selection: Selection
    folder: str | None = None
    """That contains the images."""
    before: str = ""
    """The member before this one."""

    def image(self, member: Member) -> SourceImage:
        """
        Raises:
            NotTaken: it is not an image.
            _Lost: it is an image that is not there.
            DataError: the tar is not that of one class.
        """
        tar, (folder, _, name) = self.tar, member.path.rpartition("/")
        above = next(tar.path[: -len(end)] for end in TAR_EXTENSIONS if tar.path.lower().endswith(end))
        if reason := self.selection.reason(f"{above}/{member.path}"):
            raise NotTaken(reason)
        self._refuse_webdataset(member.path)
        content = _Content(member)
        if content.use(name) == "tar":
            raise DataError(
                f"{tar.location}: {readable(tar.path)} contains tars ({readable(member.path)}) and not the images of a "
                "class; give it as the source, or leave one of the two out with --leave-out"
            )
        prefix = tar.prefix
        if self.selection.nested:
            prefix += f"{folder}/" if folder else ""
        elif folder != self.folder:
            if self.folder is not None or (folder and folder.rpartition("/")[2] != tar.class_name):
                raise DataError(
                    f"{tar.location}: {readable(tar.path)} has images in its folder {readable(folder)} and may not be "
                    "the tar of one class; if its folders are the classes, give it as the source; if all are of "
                    f"class {readable(tar.class_name)}, take them with --nested; otherwise use --leave-out"
                )
            self.folder = folder
        return SourceImage(prefix + name, (tar.class_name,), content.all())

    def _refuse_webdataset(self, path: str) -> None:
        stem, _, extension = path.lower().rpartition(".")
        stem_before, _, extension_before = self.before.rpartition(".")
        describes = stem == stem_before and extension != extension_before and {extension, extension_before} & _LABELS
        if extension == "cls" or (describes and _NUMBERED.fullmatch(self.tar.class_name)):
            raise DataError(
                f"{self.tar.location}: {readable(self.tar.path)} looks like a shard of a WebDataset and not like the "
                f"tar of a class ({readable(path)}); index its folder with: coatnet shards index"
            )
        self.before = path.lower()


class _Content:
    """The content of a member, read once."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._file: IO[bytes] | None = None
        self._head = b""

    def use(self, name: str) -> Use:
        """
        Raises:
            NotTaken: it is neither an image nor a tar.
            _Lost: its name is that of an image or a tar, and it is not there.
        """
        info = self._member.info
        if info is None and self._member.lost == LINK_UPWARDS:
            raise NotTaken(LINK_UPWARDS)
        if info is not None and info.type != b"M" and not info.isreg():
            raise NotTaken("neither a file nor a folder")
        use = use_of(name, self.head)
        if info is None or info.type == b"M":
            raise _Lost(self._member.lost or "it continues a file of another volume")
        return use

    def head(self) -> bytes:
        if self._member.info is None:
            raise NotTaken(self._member.lost)
        if self._file is None:
            self._file = self._member.open()
            self._head = self._file.read(HEAD)
        return self._head

    def all(self) -> bytes:
        return self.head() + (self._file.read() if self._file is not None else b"")


def _begins_with_tar(location: str, storage: Storage) -> bool:
    with open_file(location, storage) as file:
        try:
            found = members(lambda: open_stream(file, _BLOCK, lambda kind: None), once=True)
            return next(found).path.lower().endswith(TAR_EXTENSIONS)
        except (*DAMAGES, StopIteration):
            return False


def _listed(tar: _TarSource) -> Iterator[SourceItem]:
    """Locations of the class tars and images of an uncompressed tar; finally its damage, if any."""
    last = ""
    with open_file(tar.location, tar.storage) as file:
        try:
            for member in members(lambda: _from_start(file, lambda: open_seekable(file, tar.remark)), tar.folder):
                last = member.path
                item = None
                try:
                    item = _listed_item(tar, member)
                except NotTaken as reason:
                    tar.accounting.leave_out(str(reason), readable(member.path))
                except _Lost as reason:
                    item = SourceItem(BrokenInput(member.path, str(reason)), 0, 0.0)
                tar.accounting.found += 1
                if item is not None:
                    yield item
        except DAMAGES as error:
            yield _rest(tar, last, error)


def _listed_item(tar: _TarSource, member: Member) -> SourceItem:
    path = tar.path(member.path)
    content = _Content(member)
    use = content.use(path)
    info = member.info
    assert info is not None
    start, stop, share = info.offset_data, info.offset_data + info.size, info.size / tar.size
    if use == "tar":
        if info.issparse():
            raise _Lost("a class tar that is stored as a sparse file; unpack the outer tar, and use the folder")
        class_name, prefix = tar.folders.class_of_tar(path)
        return SourceItem(ClassTar(path, class_name, prefix, tar.location, start, stop), info.size, share)
    name, classes = tar.image(path)
    if info.issparse():  # its bytes are not those between two offsets
        return SourceItem(SourceImage(name, classes, content.all()), info.size, share)
    return SourceItem(ImageFile(name, classes, tar.location, start, stop), info.size, share)


def _streamed(tar: _TarSource) -> Iterator[SourceItem]:
    """The images of a tar, compressed or not, read sequentially."""
    tar.accounting.found = 0
    for counts in (tar.accounting.taken, tar.accounting.left_out, tar.accounting.remarks):
        counts.clear()
    last, names = "", list[str]()
    before = 0
    with open_file(tar.location, tar.storage) as file:
        try:
            for member in members(lambda: _from_start(file, lambda: open_stream(file, _BLOCK, tar.remark)), tar.folder):
                last = member.path
                try:
                    for content in _streamed_contents(tar, member):
                        now = file.tell()
                        length = len(content.encoded) if isinstance(content, SourceImage) else 0
                        yield SourceItem(content, length, max(0, now - before) / tar.size)
                        before = now
                        if tar.labels is not None and isinstance(content, SourceImage):
                            names.append(content.name)
                except NotTaken as reason:
                    tar.accounting.found += 1
                    tar.accounting.leave_out(str(reason), readable(member.path))
                except _Lost as reason:
                    tar.accounting.found += 1
                    yield SourceItem(BrokenInput(member.path, str(reason)), 0, 0.0)
        except DAMAGES as error:
            yield _rest(tar, last, error)
            return
    tar.folders.finish(tar.accounting)
    if tar.labels is not None:
        tar.labels.refuse_unknown(names)
    if before == 0:
        raise _nothing_in(tar)


def _streamed_contents(tar: _TarSource, member: Member) -> Iterator[SourceImage | BrokenInput]:
    path = tar.path(member.path)
    content = _Content(member)
    if content.use(path) == "tar":
        class_tar = ClassTar(path, *tar.folders.class_of_tar(path), tar.location, 0, 0)
        tar.accounting.found += 1
        yield from _images_of(
            class_tar, lambda: cast(BinaryIO, member.open()), tar.folders.selection, tar.accounting, once=True
        )
        return
    name, classes = tar.image(path)
    image = SourceImage(name, classes, content.all())
    tar.accounting.found += 1
    yield image


@contextmanager
def _from_start(file: BinaryIO, opened: Callable[[], AbstractContextManager[TarFile]]) -> Iterator[TarFile]:
    file.seek(0)
    with opened() as archive:
        yield archive


def _rest(tar: _TarSource, last: str, error: Exception) -> SourceItem:
    """What is lost behind the member `last` of a damaged tar."""
    if not last:
        raise DataError(f"{tar.location}: not a folder, not a list and not a readable tar ({error})") from error
    tar.accounting.found += 1
    return SourceItem(BrokenInput(tar.location, f"damaged after its member {last} ({error})", is_tar=True), 0, 0.0)


def _nothing_in(tar: _TarSource) -> DataError:
    inside = f" within {tar.within}" if tar.within else ""
    return DataError(f"{tar.location}: no class tars and no images in it{inside}; give a tar that has them")


class _Window(io.RawIOBase):
    """The bytes `start` .. `stop` of a file, read sequentially."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        self._file, self._left = file, stop - start

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
