"""One pass over one shard: its bytes and hash, its samples and labels, and what is wrong with them."""

import hashlib
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.decode import DecodeError, decode
from data.errors import DataError
from data.index import LabelFormat, ShardEntry
from data.labels import number_of, values
from data.shard import Group, groups, split_key
from data.storage import Storage, is_remote, join, pieces
from data.tar import members

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOCAL_PIECE = 4 * 2**20  # bytes
_NO_SUCH_CLASS = -2


class Problem(StrEnum):
    """Why a sample cannot be used."""

    NO_IMAGE = "no image"
    NO_LABEL = "no label"
    LABEL_UNREADABLE = "a label that cannot be read"
    LABEL_UNKNOWN = "a label that is no class"
    KEY_TWICE = "its key twice in the shard"
    IMAGE_EMPTY = "an empty image"
    IMAGE_UNKNOWN = "an image that is neither JPEG, PNG nor WebP"
    IMAGE_BROKEN = "an image that does not decode"


class Found(NamedTuple):
    """One problem: place of the sample in the shard, its key, and details, which may be empty."""

    problem: Problem
    place: int
    key: str
    detail: str


@dataclass(frozen=True, slots=True)
class ShardScan:
    """What a pass over a shard found."""

    entry: ShardEntry
    damage: str | None
    """What is wrong with the tar."""
    found: list[Found]
    """Problems of samples, by place."""
    label_values: tuple[Any, ...]
    """Labels as the samples give them, numbers or names, each once."""
    label_places: NDArray[np.int32]
    """(samples, k) positions in `label_values`, -1 where there is none."""
    formats: Counter[tuple[str, str]]
    """(extension, format by the first bytes) -> images."""
    key_hashes: NDArray[np.int64]
    """Of the different keys; they hold within this process alone."""
    packed_keys: bytes

    @property
    def keys(self) -> list[str]:
        """Key of each sample."""
        text = zlib.decompress(self.packed_keys).decode("utf-8", "surrogateescape")
        return text.split("\0") if self.entry.samples else []

    def labels(self, numbers: Mapping[Any, int]) -> tuple[NDArray[np.int32], list[Found]]:
        """Labels (samples, k), ascending, -1 where there is none, with the classes that `numbers` gives to the values;
        and the samples with a value that it lacks, which get no label.
        """
        classes = np.array([*(numbers.get(value, _NO_SUCH_CLASS) for value in self.label_values), -1], np.int32)
        rows = classes[self.label_places]
        unknown = np.flatnonzero((rows == _NO_SUCH_CLASS).any(axis=1))
        found = []
        keys = self.keys if len(unknown) else []
        for place in unknown.tolist():
            value = self.label_values[self.label_places[place][rows[place] == _NO_SUCH_CLASS][0]]
            found.append(Found(Problem.LABEL_UNKNOWN, place, keys[place], repr(value)[:60]))
        rows[unknown] = -1
        # Empty places go last; as unsigned numbers they are the greatest.
        return np.sort(rows.view(np.uint32), axis=1).view(np.int32), found


def class_numbers(classes: tuple[str, ...], label: LabelFormat) -> Mapping[Any, int]:
    """Label as a sample gives it -> position in the class list."""
    return {name if label.by == "name" else number: number for number, name in enumerate(classes)}


def scan_shard(
    folder: str, name: str, size: int, image_fields: tuple[str, ...], label: LabelFormat, storage: Storage,
    temporary: Path, *, decode_images: bool = False, progress: Callable[[int], None] = lambda count: None,
) -> ShardScan:  # fmt: skip
    """Read shard `name` of `size` bytes below `folder` once; a remote one lies in `temporary` meanwhile.

    Args:
        progress: called with each number of bytes that were read.

    Raises:
        DataError: the shard is missing, or no room for a remote one.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    location = join(folder, name)
    path = temporary / f"{hashlib.sha256(location.encode()).hexdigest()}.tar" if is_remote(location) else Path(location)
    sha256, length = hashlib.sha256(), 0
    try:
        for piece in _fetched(location, size, storage, path) if is_remote(location) else _read(path):
            sha256.update(piece)
            length += len(piece)
            progress(len(piece))
        with open(path, "rb") as file:
            found, damage = members(file.fileno())
            samples = groups(found, image_fields, label.field)
            entry = ShardEntry(name, len(samples), length, sha256.hexdigest())
            return _examined(file.fileno(), entry, _in_words(file.fileno(), damage), samples, label, decode_images)
    except FileNotFoundError:
        raise DataError(f"shard {location}: it was listed and is missing; copy it back and try again") from None
    finally:
        if is_remote(location):
            path.unlink(missing_ok=True)


def scanned_in_parallel(
    function: Callable[[Item, Path], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`function` of each item and a folder for remote shards, in the order of the items; the first error ends all."""
    with TemporaryDirectory(prefix="coatnet-shards-") as temporary, ThreadPoolExecutor(threads) as executor:
        futures = deque(executor.submit(function, item, Path(temporary)) for item in items)
        try:
            while futures:
                yield futures.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)


def _read(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_LOCAL_PIECE):
            yield piece


def _fetched(location: str, size: int, storage: Storage, path: Path) -> Iterator[bytes]:
    with open(path, "wb") as file:
        for piece in pieces(location, size, storage):
            try:
                file.write(piece)
            except OSError as error:
                raise DataError(
                    f"{path.parent}: {error.strerror}; each thread keeps one shard there: set TMPDIR to a folder on a "
                    "larger disk, or take fewer --threads"
                ) from error
            yield piece


def _in_words(descriptor: int, damage: str | None) -> str | None:
    if damage is None:
        return None
    start = os.pread(descriptor, 4, 0)
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zX", "xz")):
        if start.startswith(magic):
            return f"compressed with {name}; shards are uncompressed tars"
    return damage


def _examined(
    descriptor: int,
    entry: ShardEntry,
    damage: str | None,
    samples: list[Group],
    label: LabelFormat,
    decode_images: bool,
) -> ShardScan:
    found: list[Found] = []
    formats: Counter[tuple[str, str]] = Counter()
    value_places: dict[Any, int] = {}
    labels: list[list[int]] = []
    seen: set[str] = set()
    for place, (key, image, label_member) in enumerate((g.key, g.image, g.label) for g in samples):

        def note(problem: Problem, detail: str = "", place: int = place, key: str = key) -> None:
            found.append(Found(problem, place, key, detail))

        if key in seen:
            note(Problem.KEY_TWICE)
        seen.add(key)
        row: list[int] = []
        if label_member is None:
            note(Problem.NO_LABEL)
        else:
            try:
                given = _label_values(os.pread(descriptor, label_member.size, label_member.offset), label)
                row = [value_places.setdefault(value, len(value_places)) for value in given]
            except ValueError as error:
                note(Problem.LABEL_UNREADABLE, str(error))
        labels.append(row)
        if image is None:
            note(Problem.NO_IMAGE)
            continue
        split = split_key(image.name)
        assert split is not None
        encoded = os.pread(descriptor, image.size if decode_images else 16, image.offset)[: image.size]
        kind = _format(encoded)
        formats[split[1], kind] += 1
        if not encoded:
            note(Problem.IMAGE_EMPTY)
        elif kind == "unknown":
            note(Problem.IMAGE_UNKNOWN)
        elif decode_images:
            try:
                decode(encoded)
            except DecodeError as error:
                note(Problem.IMAGE_BROKEN, str(error))
    width = max(map(len, labels), default=0)
    places = np.full((len(samples), max(width, 1)), -1, np.int32)
    for place, row in enumerate(labels):
        places[place, : len(row)] = row
    return ShardScan(
        entry=entry,
        damage=damage,
        found=found,
        label_values=tuple(value_places),
        label_places=places,
        formats=formats,
        key_hashes=np.array([hash(key) for key in seen], np.int64),
        packed_keys=zlib.compress("\0".join(g.key for g in samples).encode("utf-8", "surrogateescape"), 1),
    )


def _label_values(content: bytes, label: LabelFormat) -> list[Any]:
    """The different labels that a member gives, in their order.

    Raises:
        ValueError: it gives none, or some are of the other kind.
    """
    found = values(content, label)
    if label.by == "number":
        found = [number_of(value) for value in found]
    elif not all(isinstance(value, str) for value in found):
        raise ValueError(f"the label {found[0]!r} is not a name")
    return list(dict.fromkeys(found))


def _format(encoded: bytes) -> str:
    if encoded[:2] == b"\xff\xd8":
        return "JPEG"
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WebP"
    return "unknown" if encoded else "empty"
