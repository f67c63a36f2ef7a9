"""Class tars: tars with the images of one class, read from front to back."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

from data.accounting import Accounting
from data.building.class_folders import Selection
from data.building.formats import HEAD, NotTaken, Use, use_of, without_tar_extension
from data.building.source import BrokenInput, ClassTar, SourceImage
from data.building.tar_members import DAMAGES, LINK_UPWARDS, SourceMember, members, open_stream
from data.errors import DataError
from data.limits import IMAGE_BYTES
from data.remote.remote_file import open_file
from data.remote.storage import Storage
from data.tar import NO_END_MARK, SEVERAL_TARS
from data.text.printable import one_line

_INNER_BLOCK = 2**14  # bytes; if the tar is truncated, at most this much before its end is lost
_NUMBERED = re.compile(r"(?:.*[-_.])?\d{3,}")  # how shards are named
_LABELS = {"json", "txt"}  # extensions of what says of an image what it shows


def describes(path: str, image: str) -> bool:
    """Whether a file says something of an image beside it, in a folder that is numbered as parts of a download are."""
    stem, _, extension = path.rpartition(".")
    folder = path.rpartition("/")[0].rpartition("/")[2]
    return extension.lower() in _LABELS and stem == image.rpartition(".")[0] and bool(_NUMBERED.fullmatch(folder))


ENDS = {NO_END_MARK: "without an end mark", SEVERAL_TARS: "of several tars behind one another"}
"""How a tar ends, for people."""


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

        yield from images_of(tar, begin, selection, accounting)


def images_of(
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
                accounting.leave_out(str(reason), one_line(f"{tar.path}/{member.path}"))
            except Lost as reason:
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
        accounting.take("class tars" + "".join(f" {ENDS[kind]}" for kind in sorted(ends)))
    else:
        accounting.leave_out("a class tar without images", one_line(tar.path))


class Lost(Exception):
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

    def image(self, member: SourceMember) -> SourceImage:
        """
        Raises:
            NotTaken: it is not an image.
            Lost: it is an image that is not there.
            DataError: the tar is not that of one class.
        """
        tar, (folder, _, name) = self.tar, member.path.rpartition("/")
        if reason := self.selection.reason(f"{without_tar_extension(tar.path)}/{member.path}"):
            raise NotTaken(reason)
        self._refuse_webdataset(member.path)
        content = Content(member)
        if content.use(name) == "tar":
            raise DataError(
                f"{tar.location}: {one_line(tar.path)} contains tars ({one_line(member.path)}) and not the images of a "
                "class; give it as the source, or leave one of the two out with --leave-out"
            )
        prefix = tar.prefix
        if self.selection.nested:
            prefix += f"{folder}/" if folder else ""
        elif folder != self.folder:
            if self.folder is not None or (folder and folder.rpartition("/")[2] != tar.class_name):
                raise DataError(
                    f"{tar.location}: {one_line(tar.path)} has images in its folder {one_line(folder)} and may not be "
                    "the tar of one class; if its folders are the classes, give it as the source; if all are of "
                    f"class {one_line(tar.class_name)}, take them with --nested; otherwise use --leave-out"
                )
            self.folder = folder
        return SourceImage(prefix + name, (tar.class_name,), content.all())

    def _refuse_webdataset(self, path: str) -> None:
        stem, _, extension = path.lower().rpartition(".")
        stem_before, _, extension_before = self.before.rpartition(".")
        describes = stem == stem_before and extension != extension_before and {extension, extension_before} & _LABELS
        if extension == "cls" or (describes and _NUMBERED.fullmatch(self.tar.class_name)):
            raise DataError(
                f"{self.tar.location}: {one_line(self.tar.path)} looks like a shard of a WebDataset and not like the "
                f"tar of a class ({one_line(path)}); index its folder with: coatnet shards index; "
                f"if it is that of a class, leave these members out with --leave-out '*.{extension}'"
            )
        self.before = path.lower()


class Content:
    """The content of a member, read once."""

    def __init__(self, member: SourceMember) -> None:
        self._member = member
        self._file: IO[bytes] | None = None
        self._head = b""

    def use(self, name: str) -> Use:
        """
        Raises:
            NotTaken: it is neither an image nor a tar.
            Lost: its name is that of an image or a tar, and it is not there.
        """
        info = self._member.info
        if info is None and self._member.lost == LINK_UPWARDS:
            raise NotTaken(LINK_UPWARDS)
        if info is not None and info.type != b"M" and not info.isreg():
            raise NotTaken("neither a file nor a folder")
        use = use_of(name, self.head)
        if info is None or info.type == b"M":
            raise Lost(self._member.lost or "it continues a file of another volume")
        return use

    def head(self) -> bytes:
        if self._member.info is None:
            raise NotTaken(self._member.lost)
        if self._file is None:
            self._file = self._member.open()
            self._head = self._file.read(HEAD)
        return self._head

    def all(self) -> bytes:
        """
        Raises:
            Lost: it is too large for an image.
        """
        head = self.head()
        rest = self._file.read(IMAGE_BYTES) if self._file is not None else b""
        if len(head) + len(rest) > IMAGE_BYTES:
            raise Lost(f"more than {IMAGE_BYTES:,} bytes")
        return head + rest


class _Window(io.RawIOBase):
    """The bytes `start` .. `stop` of a file, read sequentially."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        self._file, self._left = file, stop - start

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
