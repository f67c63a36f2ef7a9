"""One pass over a shard: its size and hash, its samples and labels, and the problems with them."""

import hashlib
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decode import DecodeError, decode
from data.errors import DataError
from data.index import LabelFormat, ShardEntry
from data.labels import class_number, stored_labels
from data.shard import SampleMembers, group_members, split_key
from data.storage import Storage, is_remote, join, pieces
from data.tar import members

_LOCAL_PIECE = 4 * 2**20  # bytes
_NO_SUCH_CLASS = -2


class Problem(StrEnum):
    """Why a sample cannot be used."""

    NO_IMAGE = "no image"
    NO_LABEL = "no label"
    LABEL_UNREADABLE = "an unreadable label"
    LABEL_UNKNOWN = "a label that is not in the class list"
    KEY_REPEATED = "a repeated key"
    IMAGE_EMPTY = "an empty image"
    IMAGE_UNKNOWN = "an image that is neither JPEG, PNG nor WebP"
    IMAGE_BROKEN = "an image that does not decode"


class SampleProblem(NamedTuple):
    """A problem with one sample: its place in the shard, its key, and details, which may be empty."""

    problem: Problem
    place: int
    key: str
    detail: str


@dataclass(frozen=True, slots=True)
class ShardScan:
    """The result of a pass over a shard."""

    entry: ShardEntry
    damage: str | None
    """What is wrong with the tar itself."""
    problems: list[SampleProblem]
    """By place."""
    label_values: tuple[Any, ...]
    """The different labels as they are stored, numbers or names."""
    label_places: NDArray[np.int32]
    """(samples, k) positions in `label_values`, padded with -1."""
    formats: Counter[tuple[str, str]]
    """(extension, format by the first bytes) -> images."""
    key_hashes: NDArray[np.int64]
    """Of the different keys; only valid within this process."""
    packed_keys: bytes

    @property
    def keys(self) -> list[str]:
        """The key of each sample."""
        text = zlib.decompress(self.packed_keys).decode("utf-8", "surrogateescape")
        return text.split("\0") if self.entry.samples else []

    def labels(self, numbers: Mapping[Any, int]) -> tuple[NDArray[np.int32], list[SampleProblem]]:
        """Labels (samples, k), ascending, padded with -1, as class numbers by `numbers`; and the samples with
        a stored value that it lacks, which get no label.
        """
        classes = np.array([*(numbers.get(value, _NO_SUCH_CLASS) for value in self.label_values), -1], np.int32)
        rows = classes[self.label_places]
        unknown = np.flatnonzero((rows == _NO_SUCH_CLASS).any(axis=1))
        problems = []
        keys = self.keys if len(unknown) else []
        for place in unknown.tolist():
            value = self.label_values[self.label_places[place][rows[place] == _NO_SUCH_CLASS][0]]
            problems.append(SampleProblem(Problem.LABEL_UNKNOWN, place, keys[place], repr(value)[:60]))
        rows[unknown] = -1
        # The padding goes last: as an unsigned number it is the greatest.
        return np.sort(rows.view(np.uint32), axis=1).view(np.int32), problems


def class_numbers(classes: tuple[str, ...], label: LabelFormat) -> Mapping[Any, int]:
    """Stored label -> position in the class list."""
    return {name if label.by == "name" else number: number for number, name in enumerate(classes)}


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """How shards are read, and how progress is reported."""

    storage: Storage = field(default_factory=Storage)
    threads: int = 4
    """Shards that are read concurrently."""
    begin: Callable[[int], None] = lambda total: None
    """Called once with the bytes of all shards."""
    progress: Callable[[int], None] = lambda count: None
    """Called by all threads with the number of bytes of each read."""


@dataclass(frozen=True, slots=True)
class ShardScanner:
    """Reads shards below `folder` whose samples have these fields; with `decode_images` it decodes every image."""

    folder: str
    image_fields: tuple[str, ...]
    label: LabelFormat
    options: ScanOptions
    decode_images: bool = False

    def scan_all(self, shards: Iterable[tuple[str, int | None]]) -> Iterator[ShardScan | None]:
        """The scan of each shard, given as name and size in bytes, in their order; None where the size is None.

        Raises:
            DataError: a shard vanished, or there is no space for a remote one.
            StorageRefused, StorageDown: access refused, or no answer.
        """
        with (
            TemporaryDirectory(prefix="coatnet-shards-") as temporary,
            ThreadPoolExecutor(self.options.threads) as executor,
        ):
            futures = deque(
                None if size is None else executor.submit(self._scan, name, size, Path(temporary))
                for name, size in shards
            )
            try:
                while futures:
                    future = futures.popleft()
                    yield None if future is None else future.result()
            finally:
                executor.shutdown(cancel_futures=True)

    def _scan(self, name: str, size: int, temporary: Path) -> ShardScan:
        """Read one shard; a remote one is kept in `temporary` meanwhile."""
        location = join(self.folder, name)
        remote = is_remote(location)
        path = temporary / f"{hashlib.sha256(location.encode()).hexdigest()}.tar" if remote else Path(location)
        sha256, length = hashlib.sha256(), 0
        try:
            for piece in _downloaded(location, size, self.options.storage, path) if remote else _read(path):
                sha256.update(piece)
                length += len(piece)
                self.options.progress(len(piece))
            with open(path, "rb") as file:
                found, damage = members(file.fileno())
                samples = group_members(found, self.image_fields, self.label.field)
                entry = ShardEntry(name, len(samples), length, sha256.hexdigest())
                damage = _describe_damage(file.fileno(), damage)
                return _scan_samples(file.fileno(), entry, damage, samples, self.label, self.decode_images)
        except FileNotFoundError:
            raise DataError(f"shard {location}: it was listed but is missing now; copy it back and try again") from None
        finally:
            if remote:
                path.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_LOCAL_PIECE):
            yield piece


def _downloaded(location: str, size: int, storage: Storage, path: Path) -> Iterator[bytes]:
    with open(path, "wb") as file:
        for piece in pieces(location, size, storage):
            try:
                file.write(piece)
            except OSError as error:
                raise DataError(
                    f"{path.parent}: {error.strerror}; each thread keeps one shard there: set TMPDIR to a folder on a "
                    "larger disk, or use fewer --threads"
                ) from error
            yield piece


def _describe_damage(descriptor: int, damage: str | None) -> str | None:
    if damage is None:
        return None
    start = os.pread(descriptor, 4, 0)
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zX", "xz")):
        if start.startswith(magic):
            return f"compressed with {name}; shards are uncompressed tars"
    return damage


def _scan_samples(
    descriptor: int,
    entry: ShardEntry,
    damage: str | None,
    samples: list[SampleMembers],
    label: LabelFormat,
    decode_images: bool,
) -> ShardScan:
    problems: list[SampleProblem] = []
    formats: Counter[tuple[str, str]] = Counter()
    value_places: dict[Any, int] = {}
    labels: list[list[int]] = []
    seen: set[str] = set()
    for place, (key, image, label_member) in enumerate((g.key, g.image, g.label) for g in samples):

        def note(problem: Problem, detail: str = "", place: int = place, key: str = key) -> None:
            problems.append(SampleProblem(problem, place, key, detail))

        if key in seen:
            note(Problem.KEY_REPEATED)
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
        problems=problems,
        label_values=tuple(value_places),
        label_places=places,
        formats=formats,
        key_hashes=np.array([hash(key) for key in seen], np.int64),
        packed_keys=zlib.compress("\0".join(g.key for g in samples).encode("utf-8", "surrogateescape"), 1),
    )


def _label_values(content: bytes, label: LabelFormat) -> list[Any]:
    """The different labels in a member, in their order.

    Raises:
        ValueError: there are none, or some are names instead of numbers or the reverse.
    """
    found = stored_labels(content, label)
    if label.by == "number":
        found = [class_number(value) for value in found]
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
