"""Tars as sources: tars of class tars and tars of images, never unpacked; their names are never used as paths."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from tarfile import TarFile
from typing import BinaryIO, cast

from data.accounting import Accounting
from data.building.class_folders import BESIDE, ClassFolders, Selection
from data.building.class_tars import ENDS, Content, Lost, images_of
from data.building.decompression import Damage, is_compressed, refuse_unread
from data.building.formats import TAR_EXTENSIONS, NotTaken
from data.building.source import BrokenInput, ClassTar, ImageFile, Source, SourceImage, SourceItem
from data.building.tar_members import DAMAGES, SourceMember, members, normal, open_seekable, open_stream
from data.classes.label_files import LabelFile
from data.errors import DataError
from data.images.signatures import SIGNATURE
from data.remote.remote_file import open_file
from data.remote.storage import Storage, file_size, is_remote, read_bytes
from data.tar import NO_END_MARK
from data.text.printable import one_line

_BLOCK = 2**20  # bytes that are read at a time


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
        self.accounting.remark(kind, f"{self.location}: a tar {ENDS[kind]}; {more}")

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
    head = read_bytes(location, storage, 0, min(SIGNATURE, size))
    try:
        refuse_unread(head)
    except Damage as error:
        raise DataError(f"{location}: {error}") from None
    compressed = is_compressed(head)
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
        images = {item.content.name for item in items if isinstance(item.content, ImageFile | SourceImage)}
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
                    tar.accounting.leave_out(str(reason), one_line(member.path))
                except Lost as reason:
                    item = SourceItem(BrokenInput(member.path, str(reason)), 0, 0.0)
                tar.accounting.found += 1
                if item is not None:
                    yield item
        except DAMAGES as error:
            yield _rest(tar, last, error)


def _listed_item(tar: _TarSource, member: SourceMember) -> SourceItem:
    path = tar.path(member.path)
    content = Content(member)
    use = content.use(path)
    info = member.info
    assert info is not None
    start, stop, share = info.offset_data, info.offset_data + info.size, info.size / tar.size
    if use == "tar":
        if info.issparse():
            raise Lost("a class tar that is stored as a sparse file; unpack the outer tar, and use the folder")
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
                    tar.accounting.leave_out(str(reason), one_line(member.path))
                except Lost as reason:
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


def _streamed_contents(tar: _TarSource, member: SourceMember) -> Iterator[SourceImage | BrokenInput]:
    path = tar.path(member.path)
    content = Content(member)
    if content.use(path) == "tar":
        class_tar = ClassTar(path, *tar.folders.class_of_tar(path), tar.location, 0, 0)
        tar.accounting.found += 1
        yield from images_of(
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
