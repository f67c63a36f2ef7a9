"""Everything below a folder, local or remote."""

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

from data.errors import DataError
from data.remote.storage import Storage, is_remote, join, list_files, list_folders


class TreeEntry(NamedTuple):
    """A file or folder of a tree."""

    path: str
    """Relative to the root, with slashes."""
    kind: Literal["file", "folder", "lost link", "link upwards", "other"]
    size: int | None = None
    """In bytes, if it was listed."""


def walk_tree(location: str, storage: Storage) -> Iterator[TreeEntry]:
    """Everything below a folder, sorted by folder and name; links are followed. Folders come before what is in them.

    Raises:
        DataError: a local folder cannot be listed.
        FileNotFoundError: no such folder.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    if is_remote(location):
        return _remote_tree(location, "", storage)
    return _local_tree(location, "", ())


def _local_tree(root: str, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[TreeEntry]:
    path = join(root, folder) if folder else root
    try:
        status = os.stat(path)
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except PermissionError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror}); make it readable") from None
    above = (*above, (status.st_dev, status.st_ino))
    folders = []
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        try:
            if entry.is_dir():
                target = entry.stat() if entry.is_symlink() else None
                upwards = target is not None and (target.st_dev, target.st_ino) in above
                folders.append(TreeEntry(name, "link upwards" if upwards else "folder"))
                continue
            is_file = entry.is_file()
        except OSError:  # links in a circle
            is_file = False
        yield TreeEntry(name, "file" if is_file else "lost link" if entry.is_symlink() else "other")
    for subfolder in folders:
        yield subfolder
        if subfolder.kind == "folder":
            yield from _local_tree(root, subfolder.path, above)


def _remote_tree(root: str, folder: str, storage: Storage) -> Iterator[TreeEntry]:
    path, prefix = (join(root, folder), f"{folder}/") if folder else (root, "")
    for name, size in list_files(path, storage).items():
        yield TreeEntry(prefix + name, "file", size)
    for name in list_folders(path, storage):
        yield TreeEntry(prefix + name, "folder")
        yield from _remote_tree(root, prefix + name, storage)
