"""What the words of a command line mean as images: files, folders, globs, addresses, or shards."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.accounting import Accounting
from data.dataset import open_dataset
from data.errors import CoatnetError, DataError
from data.index import FILE_NAME, index_version
from data.inputs.image_files import (
    STDIN,
    FileSource,
    FoundImages,
    has_image_extension,
    images_in_folder,
    images_of_glob,
    is_glob,
)
from data.inputs.image_source import ImageSource, JoinedSources
from data.inputs.shard_samples import ShardSamples, shard_number
from data.remote.cache import Cache
from data.remote.storage import Storage, checked, is_remote, join, list_files, parent, read_bytes
from data.remote.web_address import split_query, without_signature
from data.sample_reader import SampleReader


@dataclass(frozen=True, slots=True)
class Inputs:
    """Images to classify."""

    sources: JoinedSources
    left_out: Accounting
    """Files in folders that are no images."""

    def include(self, path: Path) -> bool:
        """Whether a local file is one of the images."""
        if not path.exists():
            return False
        place = os.path.realpath(path)
        files = (source for source in self.sources.sources if isinstance(source, FileSource))
        return any(os.path.realpath(one) == place for source in files for one in source.places)


def open_inputs(places: Sequence[str], storage: Storage, cache: Cache | None = None) -> Inputs:
    """The images that `places` name, in that order.

    A place is an image file, which may be missing or damaged; a folder with images in it and its subfolders; a glob
    (`**` for any depth); a folder with an index of shards, the index, or one of its tars; any of these at a URL; or
    `-`, an image on standard input.

    Raises:
        DataError: a place that is malformed, a folder or glob without images, an index that cannot be read, or nothing
            but files that do not exist.
        StorageRefused, StorageDown: a folder or index at a URL that cannot be read.
    """
    sources: list[ImageSource] = []
    readers: dict[str, SampleReader] = {}
    found, accounting = FoundImages(), Accounting("files")

    def add_files() -> None:
        nonlocal found
        if found.places:
            sources.append(FileSource(found.places, storage))
        accounting.add(found.left_out)
        found = FoundImages()

    if places.count(STDIN) > 1:
        raise DataError("-: standard input is one image; name it once")
    try:
        for place in places:
            place = place if place == STDIN else checked(place)
            if place != STDIN and is_glob(place):
                images_of_glob(place, storage, found)
            elif place != STDIN and (samples := _shards(place, storage, cache, readers)) is not None:
                add_files()
                sources.append(samples)
            elif place != STDIN and _is_folder(place, storage):
                images_in_folder(place, storage, found)
            else:
                found.places.append(place)
        add_files()
        _refuse_missing(places)
        joined = JoinedSources(sources)
        if not len(joined):
            raise DataError(f"{without_signature(places[0])}: no sample in its index; give shards that have some")
    except BaseException:
        for reader in readers.values():
            reader.close()
        raise
    return Inputs(joined, accounting)


def _refuse_missing(places: Sequence[str]) -> None:
    """Refuse a command whose files do not exist at all, before a model is read for them."""
    local = [place.removeprefix("file://") for place in places if place != STDIN and not is_remote(place)]
    if len(local) == len(places) and not any(is_glob(place) or os.path.lexists(place) for place in local):
        more = f" ({len(places):,} are named, and none exists)" if len(places) > 1 else ""
        raise DataError(f"{local[0]}: no such file or folder{more}; check the path")


def _shards(place: str, storage: Storage, cache: Cache | None, readers: dict[str, SampleReader]) -> ShardSamples | None:
    """The samples of a folder of indexed shards, an index, or a tar of one; None if the place is none of these.

    `readers` keeps one for each folder: many tars of one may be named.

    Raises:
        DataError: a tar without an index, or an index that cannot be read.
    """
    path, _ = split_query(place)
    name = path.rpartition("/")[2]
    is_tar = name.endswith(".tar") and (is_remote(place) or not Path(place).is_dir())
    folder = parent(place) if is_tar or name == FILE_NAME else place
    if folder not in readers:
        is_image = name != FILE_NAME and has_image_extension(path)
        if is_image or (name != FILE_NAME and not _has_index(folder, storage)):
            if is_tar:
                raise DataError(
                    f"{without_signature(place)}: no {FILE_NAME} beside it, which says what is in a shard; index it "
                    f"with: coatnet shards index {without_signature(place)}"
                )
            return None
        readers[folder] = SampleReader(open_dataset(folder, storage), cache)
    reader = readers[folder]
    return ShardSamples(reader, [shard_number(reader.dataset, name)] if is_tar else None)


def _has_index(folder: str, storage: Storage) -> bool:
    """Whether an index of shards is in `folder`."""
    if not is_remote(folder) and not (Path(folder) / FILE_NAME).is_file():
        return False
    try:
        return index_version(read_bytes(join(folder, FILE_NAME), storage)) is not None
    except FileNotFoundError:
        return False
    except CoatnetError as error:
        if error.retryable:
            raise
        return False  # a web server may refuse whatever it does not offer


def _is_folder(place: str, storage: Storage) -> bool:
    if not is_remote(place):
        return Path(place).is_dir()
    path, _ = split_query(place)
    if has_image_extension(path):
        return False
    if place.startswith(("http://", "https://")):
        return path.endswith("/")  # a page is a file, too
    try:
        return bool(list_files(place, storage, below=True))
    except FileNotFoundError:
        return False
