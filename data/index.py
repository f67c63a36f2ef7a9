"""`index.json`: what a set of shards holds. Its presence says that the shards are whole."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.storage import Storage, checked, join, list_files, read_bytes, write_bytes

FILE_NAME = "index.json"
LABELS_NAME = "labels.npy"
FORMAT = "coatnet-shards"
VERSION = 2


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar: name below the folder, samples, size in bytes, sha256 of the whole file in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LabelFormat:
    """How a sample says its classes."""

    field: str = "cls"
    """Extension of the member: decimal digits or a name as text, or with `json` any of the forms below."""
    key: str | None = None
    """In a JSON object, the key of the label or of the list of labels; None where the JSON is the label or the list."""
    by: Literal["number", "name"] = "number"
    """Whether labels are positions in the class list or names in it."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The shards of one dataset in their canonical order.

    A sample's id is its position in that order: the samples of the shards before its own, plus its place in the tar.
    """

    folder: str
    """Path or URL that the shards lie under."""
    classes: tuple[str, ...]
    """Class names; a label is a position in this list."""
    image_fields: tuple[str, ...]
    """Extensions under which a sample's encoded image may lie."""
    label: LabelFormat
    shards: tuple[ShardEntry, ...]
    labels_per_sample: int = 1
    """Most labels of one sample."""
    labels_sha256: str | None = None
    """Of `labels.npy` beside the index; None where there is none."""
    home: str = ""
    """Path or URL of the folder with the index; empty where that is `folder`."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """(S,) samples of each shard."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def digest(self) -> str:
        """sha256 over everything but the place: two copies of a dataset have the same digest."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def location(self, number: int) -> str:
        """Path or URL of shard `number`."""
        return join(self.folder, self.shards[number].name)

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fields": {"image": list(self.image_fields), "label": asdict(self.label)},
            "labels_per_sample": self.labels_per_sample,
            "labels_sha256": self.labels_sha256,
            "samples": self.samples,
            "bytes": self.bytes,
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def write(self, storage: Storage = Storage()) -> None:  # noqa: B008 (immutable)
        """Publish the index, whole or not at all, in its home."""
        elsewhere = {"folder": self.folder} if self.home and self.home != self.folder else {}
        text = json.dumps({**self._content(), "digest": self.digest, **elsewhere}, indent=1) + "\n"
        write_bytes(join(self.home or self.folder, FILE_NAME), text.encode(), storage)


def labels_file(labels: NDArray[np.int32]) -> tuple[bytes, str]:
    """The content of `labels.npy` for labels (N, k), -1 where there is none, in the order of the index; its sha256."""
    file = io.BytesIO()
    np.save(file, labels, allow_pickle=False)
    return file.getvalue(), hashlib.sha256(file.getvalue()).hexdigest()


def read_labels(index: ShardIndex, storage: Storage) -> NDArray[np.int32]:
    """The labels of all samples (N, k), -1 where there is none.

    Raises:
        DataError: the index has no such file, or another one lies there.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    place = join(index.home or index.folder, LABELS_NAME)
    if index.labels_sha256 is None:
        raise DataError(f"{place}: the index says nothing of it; index the shards again with: coatnet shards index")
    try:
        data = read_bytes(place, storage)
    except FileNotFoundError:
        raise DataError(f"{place} is missing; copy it there or run: coatnet shards index") from None
    if hashlib.sha256(data).hexdigest() != index.labels_sha256:
        raise DataError(f"{place}: not the file that the index was written with; copy it again")
    labels: NDArray[np.int32] = np.load(io.BytesIO(data), allow_pickle=False)
    return labels


def read_index(folder: str | Path, storage: Storage = Storage()) -> ShardIndex:  # noqa: B008 (immutable)
    """The index in `folder`, a path or URL.

    Raises:
        DataError: no index, or one that cannot be read or was changed.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    home = checked(folder)
    path = join(home, FILE_NAME)
    try:
        data = read_bytes(path, storage)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{home}: no {FILE_NAME} there; build shards with: coatnet shards build SOURCE {home}, or index those "
            "that lie there with: coatnet shards index"
        ) from None
    try:
        content = json.loads(data)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise DataError(
                f"{path}: format {content['format']} version {content['version']}, this program reads "
                f"{FORMAT} version {VERSION}; index the shards again with: coatnet shards index"
            )
        index = ShardIndex(
            folder=checked(content.get("folder", home)),
            classes=tuple(content["classes"]),
            image_fields=tuple(content["fields"]["image"]),
            label=LabelFormat(**content["fields"]["label"]),
            shards=tuple(ShardEntry(**shard) for shard in content["shards"]),
            labels_per_sample=content["labels_per_sample"],
            labels_sha256=content["labels_sha256"],
            home=home,
        )
        if index.digest != content["digest"]:
            raise DataError(
                f"{path}: does not fit its own digest, so it was damaged or changed by hand; copy it again, or index "
                "the shards again with: coatnet shards index"
            )
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not an index of shards ({error}); index the shards again") from error
    for shard in index.shards:
        if ".." in PurePosixPath(shard.name).parts or PurePosixPath(shard.name).is_absolute():
            raise DataError(f"{path}: shard {shard.name!r} lies outside the folder; this index is not to be trusted")
    return index


def check_shards(index: ShardIndex, storage: Storage = Storage()) -> None:  # noqa: B008 (immutable)
    """See by one listing that every shard is there and has its size.

    Raises:
        DataError: one is missing or of another size.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    below = any("/" in shard.name for shard in index.shards)
    try:
        sizes = list_files(index.folder, storage, below=below)
    except FileNotFoundError:
        raise DataError(f"{index.folder}: no such folder, and the shards should lie in it") from None
    for shard in index.shards:
        if shard.name not in sizes:
            raise DataError(f"{index.folder}: shard {shard.name} is missing; copy it there or build the shards again")
        if sizes[shard.name] != shard.bytes:
            raise DataError(
                f"{index.folder}: shard {shard.name} has {sizes[shard.name]:,} bytes and {shard.bytes:,} in the index; "
                "copy it again or build the shards again"
            )
