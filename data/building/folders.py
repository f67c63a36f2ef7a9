"""Folders as sources, local or remote: of class folders, of class tars, of both, or flat with a label file.

A folder is listed twice, first to find out whether it can be read, then while it is read. Only the names in one of its
folders are in memory at a time, unless a label file needs all of them.
"""

import os
from collections.abc import Iterator

from data.accounting import Accounting
from data.building.class_folders import BESIDE, ClassFolders, Selection
from data.building.class_tars import describes
from data.building.formats import HEAD, NotTaken, use_of
from data.building.source import UNKNOWN_SIZE, BrokenInput, ClassTar, ImageFile, Source, SourceItem
from data.building.tar_members import LINK_UPWARDS, LOST_LINK
from data.classes.label_files import LabelFile
from data.errors import DataError
from data.remote.storage import Storage, join, read_bytes
from data.remote.tree import TreeEntry, walk_tree
from data.text.printable import one_line


def open_folder(location: str, storage: Storage, labels: LabelFile | None, selection: Selection) -> Source:
    """The images of a folder.

    Raises:
        DataError: no images, folders that can be read in two ways, or labels that do not match; `items` raises it if
            images have gone or come since.
        FileNotFoundError: no such folder.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    accounting = Accounting("files")
    folders = ClassFolders(location, selection, is_tar=False, flat=labels is not None)
    count, bytes_, known, names = 0, 0, True, list[str]()
    for item in _items(location, storage, folders, accounting):
        count, bytes_, known = count + 1, bytes_ + item.bytes, known and item.bytes != UNKNOWN_SIZE
        if labels is not None and isinstance(item.content, ImageFile):
            names.append(item.content.name)
    folders.finish(accounting)
    if labels is not None and not names:
        raise DataError(f"{location}: no images in it; a label file is for images that are not in class folders")
    if not count:
        raise DataError(f"{location}: no class folders in it; it should hold one folder per class")
    classes = labels.assign(names) if labels is not None else {}

    def items() -> Iterator[SourceItem]:
        again, read = Accounting("files"), 0
        for content, size, _ in _items(location, storage, folders, again):
            read += 1
            if classes and isinstance(content, ImageFile):
                content = ImageFile(content.name, classes[content.name], content.location)
            yield SourceItem(content, size, 1 / count)
        if read != count:
            raise DataError(
                f"{location}: has changed while it was read, {count:,} images and tars were found at first and "
                f"{read:,} later; run this again when nothing writes to it any more"
            )
        accounting.found, accounting.left_out = again.found, again.left_out

    return Source(location, items, accounting, bytes=bytes_ if known else None)


def _items(location: str, storage: Storage, folders: ClassFolders, accounting: Accounting) -> Iterator[SourceItem]:
    """What is read of a folder; what is not is counted with its reason."""
    image = ""
    for entry in walk_tree(location, storage):
        if entry.kind == "folder":
            folders.add_folder(entry.path)
            continue
        accounting.found += 1
        try:
            yield _item(entry, location, storage, folders)
            image = entry.path
        except NotTaken as reason:
            if not folders.flat and folders.selection.reason(entry.path) is None and describes(entry.path, image):
                folder, text = one_line(entry.path.rpartition("/")[0]), one_line(entry.path)
                raise DataError(
                    f"{location}: {folder} has images with texts ({text}) and is numbered, as parts of a download are; "
                    "write a list of PATH<TAB>LABEL lines and use it as the source, or, if it is a class, leave the "
                    f"texts out with --leave-out '*.{text.rpartition('.')[2]}'"
                ) from None
            accounting.leave_out(str(reason), one_line(entry.path))


def _item(entry: TreeEntry, location: str, storage: Storage, folders: ClassFolders) -> SourceItem:
    if reason := folders.selection.reason(entry.path):
        raise NotTaken(reason)
    if entry.kind == "link upwards":
        raise NotTaken(LINK_UPWARDS)
    if entry.kind == "other":
        raise NotTaken("neither a file nor a folder")
    place = join(location, entry.path)

    def head() -> bytes:
        if entry.kind == "lost link":
            raise NotTaken(LOST_LINK)
        return read_bytes(place, storage, 0, HEAD if entry.size is None else min(HEAD, entry.size))

    folder, _, name = entry.path.rpartition("/")
    use = use_of(name, head)
    if entry.kind == "lost link":
        return SourceItem(BrokenInput(entry.path, LOST_LINK), 0, 0.0)
    if use == "tar":
        class_name, prefix = folders.class_of_tar(entry.path)
        length = entry.size if entry.size is not None else os.stat(place).st_size
        return SourceItem(ClassTar(entry.path, class_name, prefix, place, 0, length), length, 0.0)
    if not folder and not folders.flat:
        raise NotTaken(BESIDE)
    class_name, prefix = folders.class_of(folder)
    # A million requests for sizes are worth it only if all images have to be known beforehand anyway.
    size = os.stat(place).st_size if folders.flat and entry.size is None else entry.size
    classes = (class_name,) if class_name else ()
    return SourceItem(ImageFile(prefix + name, classes, place), UNKNOWN_SIZE if size is None else size, 0.0)
