"""`index.json`: what a set of shards contains. It is written last: where it exists, the shards are complete."""

import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files.digest import json_sha256
from data.files.json_records import check_at_least, check_sha256, load_json, to_record
from data.limits import INDEX_BYTES, LABELS_BYTES
from data.remote.storage import Storage, checked, is_remote, join, named_sizes, parent, read_bytes, write_bytes
from data.remote.web_address import split_query, without_signature

FILE_NAME = "index.json"
LABELS_NAME = "labels.npy"
FORMAT = "coatnet-shards"
VERSION = 2


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar: path below the folder, samples, size in bytes, sha256 of the file in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        is_inside = path.parts and ".." not in path.parts and not path.is_absolute() and "\0" not in self.name
        if not is_inside or not _is_encodable(self.name):
            raise ValueError(f"name: {self.name!r} is not a path in the folder; do not trust this index")
        check_sha256(self.sha256)
        check_at_least(0, samples=self.samples, bytes=self.bytes)
        if self.samples > self.bytes // tarfile.BLOCKSIZE:  # each has a header at least
            raise ValueError(f"samples: {self.samples:,} do not fit into {self.bytes:,} bytes")


def _is_encodable(name: str) -> bool:
    """Whether a file can have this name; JSON allows halves of characters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class LabelFormat:
    """How the label of a sample is stored."""

    field: str = "cls"
    """Extension of the member: a number or name as text, or for `json` one of the forms below."""
    key: str | None = None
    """Key of the label or list of labels in a JSON object; None if the JSON is the label or the list itself."""
    by: Literal["number", "name"] = "number"
    """Whether labels are positions in the class list or class names."""
    lists: Literal["", "classes", "multi-hot"] = ""
    """What lists contain: classes, or a 0 or 1 for each class. By default JSON has lists of classes and text none."""
    first: int = 0
    """The number of the first class."""
    ignored: tuple[str, ...] = ()
    """Labels of samples that are left out of the epochs, such as -1."""

    def content(self) -> dict[str, Any]:
        """As in the index file, in which what was added to version 2 is missing by default."""
        added = {"lists": self.lists, "first": self.first, "ignored": list(self.ignored)}
        return {"field": self.field, "key": self.key, "by": self.by} | {name: v for name, v in added.items() if v}


@dataclass(frozen=True, slots=True)
class _FileHeader:
    format: str
    version: int


@dataclass(frozen=True, slots=True)
class _FieldNames:
    image: tuple[str, ...]
    label: LabelFormat


@dataclass(frozen=True, slots=True)
class _IndexFile:
    fields: _FieldNames
    labels_per_sample: int
    labels_sha256: str | None
    classes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    digest: str
    images_decode: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        check_at_least(1, labels_per_sample=self.labels_per_sample)
        if self.labels_per_sample > max(1, len(self.classes)):
            raise ValueError(f"labels_per_sample: {self.labels_per_sample:,} of {len(self.classes):,} classes")
        if self.fields.label.by == "name" and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name is repeated, and the labels are names")
        if self.labels_sha256 is not None:
            check_sha256(self.labels_sha256, "labels_sha256")
        for name in (*self.fields.image, self.fields.label.field):
            if not name or "/" in name:
                raise ValueError(f"fields: {name!r} is not the extension of a member")
        names = {shard.name for shard in self.shards}
        if len(names) != len(self.shards):
            raise ValueError("shards: some names occur more than once")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The shards of one dataset in their canonical order.

    A sample's id is its position in that order: the number of samples in all earlier shards plus its place in the tar.
    """

    folder: str
    """Path or URL of the folder with the shards."""
    classes: tuple[str, ...]
    """Class names; a label is a position in this list."""
    image_fields: tuple[str, ...]
    """Extensions that the encoded image of a sample may have."""
    label: LabelFormat
    shards: tuple[ShardEntry, ...]
    labels_per_sample: int = 1
    """Greatest number of labels of one sample."""
    labels_sha256: str | None = None
    """Of `labels.npy` beside the index; None if there is none."""
    home: str = ""
    """Path or URL of the folder with the index; empty if that is `folder`."""
    images_decode: bool = False
    """Whether every image was decoded, whole and without an error, when the shards were built or indexed."""

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
        """sha256 of everything but the location: copies of a dataset have the same digest.

        `images_decode` is no part of it: where it holds, no picture is damaged, and what follows from it is speed.
        The query of a web address, such as a signature, belongs to the location.
        """
        content = self._content()
        if self.folder.startswith(("http://", "https://")):
            for shard in content["shards"]:
                shard["name"] = shard["name"].partition("?")[0]
        return json_sha256(content)

    def location(self, number: int) -> str:
        """Path or URL of shard `number`."""
        return join(self.folder, self.shards[number].name)

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fields": {"image": list(self.image_fields), "label": self.label.content()},
            "labels_per_sample": self.labels_per_sample,
            "labels_sha256": self.labels_sha256,
            "samples": self.samples,
            "bytes": self.bytes,
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def write(self, storage: Storage = Storage()) -> None:  # noqa: B008 (immutable)
        """Publish the index atomically in its home."""
        decode = {"images_decode": True} if self.images_decode else {}
        elsewhere = {"folder": self.folder} if self.home and self.home != self.folder else {}
        text = json.dumps({**self._content(), "digest": self.digest, **decode, **elsewhere}, indent=1) + "\n"
        write_bytes(join(self.home or self.folder, FILE_NAME), text.encode(), storage)


def labels_file(labels: NDArray[np.int32]) -> tuple[bytes, str]:
    """The content of `labels.npy` and its sha256, for labels (N, k) in index order, padded with -1."""
    file = io.BytesIO()
    np.save(file, labels, allow_pickle=False)
    return file.getvalue(), hashlib.sha256(file.getvalue()).hexdigest()


def read_labels(index: ShardIndex, storage: Storage) -> NDArray[np.int32]:
    """The labels of all samples (N, k), padded with -1.

    Raises:
        DataError: the index has no such file, or it is missing, damaged or another one.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    place = join(index.home or index.folder, LABELS_NAME)
    if index.labels_sha256 is None:
        raise DataError(f"{place}: the index does not list it; index the shards again with: coatnet shards index")
    try:
        data = read_bytes(place, storage, most=LABELS_BYTES)
    except FileNotFoundError:
        raise DataError(f"{place} is missing; copy it there or run: coatnet shards index") from None
    if hashlib.sha256(data).hexdigest() != index.labels_sha256:
        raise DataError(f"{place}: does not match the index (another sha256); copy it again")
    try:
        labels = _parse_labels(data, index.samples)
    except (ValueError, EOFError) as error:
        raise DataError(f"{place}: {error}; index the shards again with: coatnet shards index") from None
    least, greatest = labels.min(initial=0), labels.max(initial=-1)
    if labels.shape[1] != index.labels_per_sample or least < -1 or greatest >= len(index.classes):
        raise DataError(
            f"{place}: up to {labels.shape[1]:,} labels of a sample, from {least} to {greatest}, and in the index up "
            f"to {index.labels_per_sample:,} of {len(index.classes):,} classes; index the shards again with: "
            "coatnet shards index"
        )
    return labels


def _parse_labels(data: bytes, samples: int) -> NDArray[np.int32]:
    """The array in a numpy file, whose header is believed only if that many bytes follow it.

    Raises:
        ValueError: it is not one, or has another type or shape.
    """
    file = io.BytesIO(data)
    try:
        first = np.lib.format.read_magic(file) == (1, 0)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)
    except Exception as error:  # numpy evaluates the header as Python, and raises anything on damaged ones
        raise ValueError(f"not a numpy array ({error})") from None
    if dtype != np.int32 or len(shape) != 2 or shape[0] != samples or type(shape[1]) is not int or shape[1] < 0:
        raise ValueError(f"{dtype} {shape} instead of int32 labels of {samples:,} samples")
    if len(data) - file.tell() != shape[0] * shape[1] * dtype.itemsize:
        raise ValueError(f"not a numpy array (its header promises {shape}, which its length contradicts)")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def index_version(content: bytes) -> int | None:
    """The format version of an `index.json`, None if the content is something else."""
    try:
        header = to_record(_FileHeader, load_json(content))
    except ValueError:
        return None
    return header.version if header.format == FORMAT else None


def read_index(folder: str | Path, storage: Storage = Storage()) -> ShardIndex:  # noqa: B008 (immutable)
    """The index in `folder`, a path or URL.

    Raises:
        DataError: no index, or one that is damaged, was changed, or has another version.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    home = checked(folder)
    home = parent(home) if home.rpartition("/")[2] == FILE_NAME else home
    path = join(home, FILE_NAME)
    try:
        data = read_bytes(path, storage, most=INDEX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{home}: no {FILE_NAME} there; build shards with: coatnet shards build SOURCE {home}, or index "
            "existing ones with: coatnet shards index"
        ) from None
    try:
        content = load_json(data)
        header = to_record(_FileHeader, content)
        if (header.format, header.version) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {header.format} version {header.version}, this program reads {FORMAT} version "
                f"{VERSION}; index the shards again with: coatnet shards index"
            )
        file = to_record(_IndexFile, content)
    except ValueError as error:
        raise DataError(
            f"{path}: not an index of shards ({error}); copy it again, or index the shards again with: "
            "coatnet shards index"
        ) from None
    index = ShardIndex(
        folder=checked(file.folder or home),
        classes=file.classes,
        image_fields=file.fields.image,
        label=file.fields.label,
        shards=file.shards,
        labels_per_sample=file.labels_per_sample,
        labels_sha256=file.labels_sha256,
        home=home,
        images_decode=file.images_decode,
    )
    if index.digest != file.digest:
        raise DataError(
            f"{path}: does not match its own digest, so it was damaged or edited by hand; copy it again, or index "
            "the shards again with: coatnet shards index"
        )
    if is_elsewhere(index) and not storage.shards_elsewhere:
        raise DataError(
            f"{path}: names shards outside of its own folder, in {without_signature(index.folder)}; if you trust "
            "whoever wrote this index, set data.storage.shards_elsewhere (--shards-elsewhere), else index the shards "
            "yourself with: coatnet shards index"
        )
    return index


def is_elsewhere(index: ShardIndex) -> bool:
    """Whether a remote index names shards that are not below its own folder.

    Whoever wrote it chooses what is read with the rights of its reader, so that this needs his consent. A local index
    is the reader's own.
    """
    if not is_remote(index.home) or index.folder == index.home:
        return False
    home, folder = split_query(index.home)[0], split_query(index.folder)[0]
    return ".." in folder.split("/") or not f"{folder}/".startswith(f"{home.rstrip('/')}/")


def check_shards(index: ShardIndex, storage: Storage = Storage()) -> None:  # noqa: B008 (immutable)
    """See that every shard is there and has its size.

    Raises:
        DataError: one is missing or of another size.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    try:
        sizes = named_sizes(index.folder, [shard.name for shard in index.shards], storage)
    except FileNotFoundError:
        raise DataError(
            f"{index.folder}: no such folder; the index in {index.home} expects the shards there: move them back, "
            f"or index them again with: coatnet shards index FOLDER --output {index.home} --overwrite"
        ) from None
    for shard in index.shards:
        if shard.name not in sizes:
            raise DataError(f"{index.folder}: shard {shard.name} is missing; copy it there or build the shards again")
        if sizes[shard.name] != shard.bytes:
            raise DataError(
                f"{index.folder}: shard {shard.name} has {sizes[shard.name]:,} bytes and {shard.bytes:,} in the index; "
                "copy it again or build the shards again"
            )
