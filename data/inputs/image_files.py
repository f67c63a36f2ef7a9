"""Images in files: named one by one, by folders, by globs, or by their addresses."""

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.accounting import Accounting
from data.building.formats import HEAD, IMAGE_EXTENSIONS, NotTaken, use_of
from data.errors import CoatnetError, DataError
from data.files.hidden import is_hidden
from data.files.regular_file import read_regular
from data.indexing.pattern import WILDCARDS, matches_glob
from data.inputs.image_source import StoredImage, UnreadableImage
from data.limits import IMAGE_BYTES
from data.remote.storage import Storage, file_size, is_remote, join, read_bytes
from data.remote.tree import TreeEntry, walk_tree
from data.remote.web_address import split_query, without_signature
from data.text.printable import one_line

STDIN = "-"
"""The name of the image on standard input."""
_TAR = "tars; of shards, give the folder with their index.json"
_LINKS = {"lost link": "a link to nothing", "link upwards": "a link to a folder above it"}


@dataclass(frozen=True, slots=True)
class FoundImages:
    """Images in files, and what was left out of the folders that were searched."""

    places: list[str] = field(default_factory=list)
    """Paths or URLs as they were given, below a folder with its name before theirs."""
    left_out: Accounting = field(default_factory=lambda: Accounting("files"))


def has_image_extension(path: str) -> bool:
    """Whether a file is an image by its name."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


def is_glob(place: str) -> bool:
    """Whether a path has wildcards, unless a file or folder of exactly this name exists, or a URL has a `*`."""
    if is_remote(place):
        return "*" in split_query(place)[0]
    return any(mark in place for mark in WILDCARDS) and not Path(place).exists()


def images_in_folder(place: str, storage: Storage, found: FoundImages) -> None:
    """Add the images of a folder and its subfolders to `found`.

    Files are taken by their extension, or by their first bytes where that does not say what they are; hidden ones are
    left out.

    Raises:
        DataError: there is no such folder, or no image in it.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    if not _search(place, storage, found, lambda parts: True):
        raise DataError(
            f"{without_signature(place)}: no images in it and its subfolders; name the folder that has them"
        )


def images_of_glob(place: str, storage: Storage, found: FoundImages) -> None:
    """Add the images that a glob matches to `found`, with those in the folders that it matches.

    Raises:
        DataError: it matches no image.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    path, query = split_query(place)
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if any(mark in part for mark in WILDCARDS))
    folder, glob = "/".join(parts[:first]), parts[first:]
    root = (folder or ("/" if path.startswith("/") else ".")) + query

    def matches(names: list[str]) -> bool:
        return any(matches_glob(names[:length], glob) for length in range(1, len(names) + 1))

    if not _search(root, storage, found, matches, shown=folder if folder or path.startswith("/") else None):
        raise DataError(f"{without_signature(place)}: matches no image; {_instead(found)}")


def _instead(found: FoundImages) -> str:
    """What to do where no image is found."""
    if _TAR not in found.left_out.left_out:
        return "check the path"
    return f"there are {_TAR} ({found.left_out.left_out[_TAR].first[0]})"


def _search(
    root: str,
    storage: Storage,
    found: FoundImages,
    wanted: Callable[[list[str]], bool],
    shown: str | None = "",
) -> int:
    """Add the images below `root` whose paths are `wanted`; returns how many."""
    before, accounting = len(found.places), found.left_out
    try:
        for entry in walk_tree(root, storage):
            parts = entry.path.split("/")
            if entry.kind == "folder" or not wanted(parts):
                continue
            place = entry.path if shown is None else join(root, entry.path)
            accounting.found += 1
            try:
                _take(entry, parts, place, storage)
            except NotTaken as reason:
                accounting.leave_out(str(reason), one_line(without_signature(place)))
            else:
                found.places.append(place)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{without_signature(root)}: no such folder; check the path") from None
    return len(found.places) - before


def _take(entry: TreeEntry, parts: list[str], place: str, storage: Storage) -> None:
    """
    Raises:
        NotTaken: an entry of a folder is no image.
    """
    if any(map(is_hidden, parts)):
        raise NotTaken("hidden")
    if entry.kind == "other":
        raise NotTaken("neither a file nor a folder")
    if entry.kind == "lost link" and has_image_extension(entry.path):
        return  # an image that cannot be read, rather than none
    if entry.kind in _LINKS:
        raise NotTaken(_LINKS[entry.kind])

    def head() -> bytes:
        return read_bytes(place, storage, 0, HEAD if entry.size is None else min(HEAD, entry.size))

    if use_of(parts[-1], head) == "tar":
        raise NotTaken(_TAR)


class FileSource:
    """The images at `places`, which are paths, URLs, or `-` for standard input."""

    def __init__(self, places: Sequence[str], storage: Storage, stdin: BinaryIO | None = None) -> None:
        self.classes: tuple[str, ...] = ()
        self.places, self._storage = places, storage
        self._stdin = stdin
        self._silent: dict[str, str] = {}
        """Servers that have not answered for too long, and their error."""

    def __len__(self) -> int:
        return len(self.places)

    def name(self, number: int) -> str:
        return without_signature(self.places[number])

    def read(self, number: int) -> StoredImage:
        place = self.places[number]
        if place == STDIN:
            return StoredImage(_limited((self._stdin or _standard_input()).read(IMAGE_BYTES + 1)))
        server = "/".join(place.split("/")[:3]) if is_remote(place) else ""
        if server in self._silent:
            raise UnreadableImage(f"not tried, since its server did not answer: {self._silent[server]}", may_pass=True)
        try:
            if not is_remote(place):
                return StoredImage(read_regular(place, IMAGE_BYTES))
            size = file_size(place, self._storage)
            if size > IMAGE_BYTES:
                raise UnreadableImage(f"{size:,} bytes; at most {IMAGE_BYTES:,} are read")
            return StoredImage(_limited(read_bytes(place, self._storage, 0, size)))
        except FileNotFoundError:
            raise UnreadableImage("no such file") from None
        except OSError as error:
            reason = "a folder" if error.errno == errno.EISDIR else error.strerror or str(error)
            raise UnreadableImage(reason) from None
        except CoatnetError as error:
            reason = str(error).removeprefix(f"{without_signature(place)}: ")
            if error.retryable and server:
                self._silent[server] = reason
            raise UnreadableImage(reason, may_pass=error.retryable) from None

    def prepare(self, first: int, last: int) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def _standard_input() -> BinaryIO:
    if sys.stdin is None:  # as Python sets it where it is closed
        raise UnreadableImage("standard input is closed; pipe an image to it")
    if sys.stdin.isatty():
        raise UnreadableImage("standard input is a terminal; pipe an image to it")
    return sys.stdin.buffer


def _limited(content: bytes) -> bytes:
    if len(content) > IMAGE_BYTES:
        raise UnreadableImage(f"more than {IMAGE_BYTES:,} bytes; no more are read")
    return content
