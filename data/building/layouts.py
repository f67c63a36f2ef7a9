"""Layouts of sources, local or remote: folders, tars, and lists of images."""

import codecs
import io
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from data.accounting import Accounting
from data.building.archive import open_tar
from data.building.class_folders import Selection
from data.building.folders import open_folder
from data.building.formats import TAR_EXTENSIONS
from data.building.source import UNKNOWN_SIZE, ImageFile, Source, SourceItem
from data.building.webdataset import index_at, open_webdataset
from data.classes.label_files import LabelFile, label_lines
from data.errors import DataError
from data.remote.remote_file import open_file
from data.remote.storage import Storage, checked, file_size, is_remote, join, parent
from data.text.printable import one_line

_LIST_EXTENSIONS = (".txt", ".tsv", ".csv")


def open_source(
    location: str,
    storage: Storage,
    labels: LabelFile | None = None,
    selection: Selection = Selection(),  # noqa: B008 (immutable)
) -> Source:
    """The images at `location`: a folder, a tar, or a list file.

    Args:
        location: path or URL.
        storage: how to access it.
        labels: of images that are not in class folders.
        selection: which entries are taken.

    Raises:
        DataError: nothing there, no images, a class without images, or labels that do not match.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    location = checked(location)
    name = location.lower()
    if not name.endswith((*TAR_EXTENSIONS, *_LIST_EXTENSIONS)) and (index := index_at(location, storage)) is not None:
        if labels is not None or selection != Selection():
            raise DataError(f"{location}: has an index with its labels; leave out --labels, --nested and the like")
        return open_webdataset(index, storage)
    is_list = name.endswith(_LIST_EXTENSIONS)
    # By name, since in an object store a folder exists only as a prefix of names.
    is_file = is_list or name.endswith(TAR_EXTENSIONS) if is_remote(location) else os.path.isfile(location)
    if selection.within is not None and (is_list or not is_file):
        raise DataError(
            f"{location}: --within selects a folder of a tar, and this is not a tar; use the folder as the source"
        )
    try:
        if is_file and is_list:
            if labels is not None:
                raise DataError(f"{location}: a list contains its labels; remove the label file")
            if selection != Selection():
                raise DataError(f"{location}: --nested and --leave-out are for folders and tars, and this is a list")
            return _list_file(location, storage)
        if is_file:
            return open_tar(location, storage, labels, selection)
        if not is_remote(location) and not os.path.isdir(location):
            raise FileNotFoundError(location)
        return open_folder(location, storage, labels, selection)
    except FileNotFoundError:
        raise DataError(f"{location}: no such file or folder") from None


def _list_file(location: str, storage: Storage) -> Source:
    """Lines of PATH<TAB>LABEL [LABEL ...], paths relative to the folder of the list; read lazily."""
    size = file_size(location, storage)
    home = parent(location)
    accounting = Accounting("lines")

    def items() -> Iterator[SourceItem]:
        accounting.found = 0
        accounting.left_out.clear()
        with open_file(location, storage) as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{location}: is in UTF-16; save it as UTF-8")
            file.seek(0)
            lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
            for number, path, labels, length, left_out in label_lines(lines, location):
                accounting.found += 1
                if left_out:
                    accounting.leave_out(left_out, f"line {number:,}")
                    continue
                if not labels:
                    raise DataError(
                        f"{location}: line {number:,}: no label; it should be PATH<TAB>LABEL, in CSV PATH,LABEL, "
                        f"and is {one_line(path)}"
                    )
                if "://" not in path:
                    path = posixpath.normpath(path)  # so that ./a.jpg and a.jpg are noticed to be the same image
                place = path if "://" in path or Path(path).is_absolute() else join(home, path)
                yield SourceItem(ImageFile(path, labels, place), UNKNOWN_SIZE, length / size)

    if next(items(), None) is None:
        raise DataError(f"{location}: no lines in it; it should have lines of PATH<TAB>LABEL")
    return Source(location, items, accounting)
