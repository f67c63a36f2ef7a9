"""Layouts of sources, local or remote: folders of class folders or tars, flat folders with labels, lists, tars."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from data.building.archive import open_tar
from data.building.keys import readable
from data.building.source import IMAGE_EXTENSIONS, UNKNOWN_SIZE, ClassTar, ImageFile, Source, SourceItem, is_image
from data.errors import DataError
from data.label_files import LabelFile, label_lines
from data.remote_file import open_file
from data.storage import Storage, checked, file_size, is_remote, join, list_files, list_folders, parent

_LIST_EXTENSIONS = (".txt", ".tsv", ".csv")
_TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def open_source(location: str, storage: Storage, labels: LabelFile | None = None, within: str | None = None) -> Source:
    """The images at `location`: a folder, a tar, or a list file.

    Args:
        location: path or URL.
        storage: how to access it.
        labels: of images that are not in class folders.
        within: folder of a tar to read images from.

    Raises:
        DataError: nothing there, no images, a class without images, or labels that do not match.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    location = checked(location)
    name = location.lower()
    is_list = name.endswith(_LIST_EXTENSIONS)
    # By name, since in an object store a folder exists only as a prefix of names.
    is_file = is_list or name.endswith(_TAR_EXTENSIONS) if is_remote(location) else os.path.isfile(location)
    if within is not None and (is_list or not is_file):
        raise DataError(
            f"{location}: --within selects a folder of a tar, and this is not a tar; use the folder as the source"
        )
    try:
        if is_file and is_list:
            if labels is not None:
                raise DataError(f"{location}: a list contains its labels; remove the label file")
            return _list_file(location, storage)
        if is_file:
            return open_tar(location, storage, labels, within)
        if not is_remote(location) and not os.path.isdir(location):
            raise FileNotFoundError(location)
        return _flat_folder(location, storage, labels) if labels is not None else _folder(location, storage)
    except FileNotFoundError:
        raise DataError(f"{location}: no such file or folder") from None


def _folder(location: str, storage: Storage) -> Source:
    classes = _classes(location, storage)
    if not classes:
        return _folder_of_tars(location, storage)
    for class_name, names in classes.items():
        if next(iter(names()), None) is None:
            raise DataError(
                f"{location}: class folder {readable(class_name)} has no image ({', '.join(IMAGE_EXTENSIONS)}); add "
                "images or remove it, or use the folder that contains the class folders"
            )

    def items() -> Iterator[SourceItem]:
        for class_name, names in classes.items():
            files = sorted(names())
            for file in files:
                name = f"{class_name}/{file}"
                image = ImageFile(name, (class_name,), join(location, name))
                yield SourceItem(image, UNKNOWN_SIZE, 1 / len(files) / len(classes))

    return Source(location, items)


def _classes(location: str, storage: Storage) -> dict[str, Callable[[], Iterator[str]]]:
    """Class -> its images, listed on demand: a folder of millions is not kept in memory."""

    def listing(folder: str) -> Callable[[], Iterator[str]]:
        def names() -> Iterator[str]:
            if is_remote(folder):
                yield from (name for name in list_files(folder, storage) if is_image(name))
                return
            with os.scandir(folder) as entries:
                yield from (entry.name for entry in entries if is_image(entry.name) and entry.is_file())

        return names

    folders = [name for name in list_folders(location, storage) if not name.startswith(".")]
    return {name: listing(join(location, name)) for name in folders}


def _folder_of_tars(location: str, storage: Storage) -> Source:
    files = list_files(location, storage)
    tars = {name: size for name, size in files.items() if name.endswith(".tar") and not name.startswith(".")}
    if not tars:
        flat = any(is_image(name) for name in files)
        fix = "provide their labels with --labels FILE" if flat else "it should hold one folder per class"
        raise DataError(f"{location}: no class folders in it{', only images' if flat else ''}; {fix}")
    total = sum(tars.values())
    return Source(
        location,
        lambda: (
            SourceItem(ClassTar(name.removesuffix(".tar"), join(location, name), 0, size), size, size / max(total, 1))
            for name, size in tars.items()
        ),
        bytes=total,
    )


def _flat_folder(location: str, storage: Storage, labels: LabelFile) -> Source:
    files = {name: size for name, size in list_files(location, storage).items() if is_image(name)}
    if not files:
        raise DataError(
            f"{location}: no images in it ({', '.join(IMAGE_EXTENSIONS)}); a label file is for images that are not in "
            "class folders"
        )
    classes = labels.assign(files)
    total = sum(files.values())
    return Source(
        location,
        lambda: (
            SourceItem(ImageFile(name, classes[name], join(location, name)), size, size / max(total, 1))
            for name, size in files.items()
        ),
        bytes=total,
    )


def _list_file(location: str, storage: Storage) -> Source:
    """Lines of PATH<TAB>LABEL [LABEL ...], paths relative to the folder of the list; read lazily."""
    size = file_size(location, storage)
    home = parent(location)

    def items() -> Iterator[SourceItem]:
        with open_file(location, storage) as file:
            lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
            for number, path, labels, length, left_out in label_lines(lines, location):
                if left_out:
                    continue
                if not labels:
                    raise DataError(f"{location}: line {number:,}: no label; it should be PATH<TAB>LABEL")
                place = path if "://" in path or Path(path).is_absolute() else join(home, path)
                yield SourceItem(ImageFile(path, labels, place), UNKNOWN_SIZE, length / size)

    if next(items(), None) is None:
        raise DataError(f"{location}: no lines in it; it should have lines of PATH<TAB>LABEL")
    return Source(location, items)
