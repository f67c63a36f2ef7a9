"""Indexed WebDatasets as sources, so that sets that are sorted by class can be shuffled once for all."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.accounting import Accounting
from data.building.source import BrokenInput, IndexedShard, Source, SourceImage, SourceIndex, SourceItem
from data.classes.labels import IgnoredLabel, LabelReader
from data.errors import DataError, StorageRefused
from data.files.json_records import load_json
from data.files.regular_file import open_regular
from data.index import FILE_NAME, ShardIndex, check_shards, index_version, read_index
from data.limits import INDEX_BYTES, LABEL_BYTES
from data.remote.remote_file import open_file
from data.remote.storage import Storage, is_remote, join, parent, read_bytes
from data.shard import Shard, split_key
from data.tarfile_limits import open_limited
from data.text.printable import one_line

_COPIED = 2**22  # bytes at a time
_LOOKED_AT = 20  # members of a shard, for what its samples have besides image and label


def index_at(location: str, storage: Storage) -> ShardIndex | None:
    """The index in the folder `location`, or at the location of the `index.json` itself; None if there is none.

    Raises:
        DataError: one that is damaged or of another version, or a location of an index where none is.
        StorageDown: no answer.
    """
    named = location.rpartition("/")[2] == FILE_NAME
    home = parent(location) if named else location
    try:
        content = read_bytes(join(home, FILE_NAME), storage, most=INDEX_BYTES)
    except (FileNotFoundError, NotADirectoryError, StorageRefused):
        # Object stores refuse what does not exist to those who may not list it.
        return read_index(home, storage) if named else None
    return read_index(home, storage) if named or index_version(content) is not None else None


def open_webdataset(index: ShardIndex, storage: Storage) -> Source:
    """The samples of an indexed WebDataset. Their classes are the numbers of the index, as text.

    Raises:
        DataError: a shard is missing or has another size than in the index.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    if not index.folder.startswith(("http://", "https://")):  # these have no listing; a missing shard is found later
        check_shards(index, storage)
    accounting = Accounting("shards and samples", found=len(index.shards))
    items = []
    for number, entry in enumerate(index.shards):
        if not entry.samples:
            accounting.leave_out("shards without samples", entry.name)
            continue
        location = index.location(number)
        shard = IndexedShard(
            location, number, entry.name, entry.samples, index.image_fields, index.label, index.classes
        )
        items.append(SourceItem(shard, entry.bytes, entry.bytes / index.bytes))
    home = index.home or index.folder
    return Source(home, lambda: iter(items), accounting, index.bytes, index=SourceIndex(home, index.digest))


def indexed_classes(source: SourceIndex, storage: Storage) -> tuple[str, ...]:
    """The class list of the index of a source.

    Raises:
        DataError: it is missing, or another one than when its shards were read.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    index = read_index(source.location, storage)
    if index.digest != source.digest:
        raise DataError(f"{source.location}: the index has changed since its shards were read; build from it again")
    return index.classes


def shard_images(shard: IndexedShard, storage: Storage, accounting: Accounting) -> Iterator[SourceImage | BrokenInput]:
    """The samples of a shard in its order. The shard and the samples are counted in `accounting`, except that what is
    yielded is only counted as found.

    Raises:
        DataError: the shard is missing, or is not that of the index.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    read_labels = LabelReader(shard.label, shard.classes)
    with _local_copy(shard.location, storage) as path:
        _remark_on_the_rest(path, shard, accounting)
        tar = Shard(path, shard.image_fields, shard.label.field, shard.samples)
        for place in range(shard.samples):
            accounting.found += 1
            key = tar.key(place)
            try:
                sample = tar.read(place)
                classes = tuple(map(str, read_labels(sample.label)))
            except IgnoredLabel:
                accounting.leave_out("a label to be ignored", f"{shard.name}: {key}")
                continue
            except ValueError as error:
                yield BrokenInput(f"{shard.name}: {key}", str(error))
                continue
            yield SourceImage(_name(shard, place, key), classes, sample.image)
    accounting.take("shards")


def _name(shard: IndexedShard, place: int, key: str) -> str:
    """Unique, also where keys are repeated in other shards; the key in the new shard follows from what is before the
    last dot."""
    readable = shard.name.removesuffix(".tar").replace("/", "_").replace(".", "_")
    return f"{key}.sample {place} of {readable} (shard {shard.number})"


@contextmanager
def _local_copy(location: str, storage: Storage) -> Iterator[Path]:
    """A local file with the content of `location`, which is itself if it is local."""
    try:
        if not is_remote(location):
            yield Path(location)
            return
        with tempfile.NamedTemporaryFile() as copy:
            with open_file(location, storage) as file:
                shutil.copyfileobj(file, copy, _COPIED)
            copy.flush()
            yield Path(copy.name)
    except FileNotFoundError:
        raise DataError(f"shard {location} is missing; copy it there, or index the shards again") from None


def _remark_on_the_rest(path: Path, shard: IndexedShard, accounting: Accounting) -> None:
    """Say what the samples have besides an image and labels, judged by the first ones: it is not carried over."""
    rest: set[str] = set()
    try:
        with open_regular(path) as file, open_limited(file) as archive:
            for member, _ in zip(archive, range(_LOOKED_AT), strict=False):
                split = split_key(member.name)
                if split is None or split[1] in shard.image_fields:
                    continue
                if split[1] != shard.label.field:
                    rest.add(f".{split[1]} members")
                elif shard.label.key is not None and (label := archive.extractfile(member)) is not None:
                    content = load_json(label.read(LABEL_BYTES))
                    labels = {shard.label.key, shard.label.key.partition(".")[0]}
                    keys = content if isinstance(content, dict) else ()
                    rest |= {f"{one_line(key)} in .{split[1]}" for key in keys if key not in labels}
    except (tarfile.TarError, ValueError):
        pass  # what is damaged is found, and named, by reading it
    if rest:
        listing = ", ".join(sorted(rest))
        accounting.remark("other_content", f"images and labels are kept; what else samples have is not: {listing}")
