"""One pass over a shard: its size and hash, its samples and labels, and the problems with them."""

import hashlib
import os
import re
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

from data.accounting import Accounting
from data.classes.labels import label_values, stored_labels
from data.errors import DataError
from data.files.hidden import is_hidden
from data.images.decode import DecodeError, decode
from data.images.signatures import SIGNATURE, compression, image_format
from data.index import LabelFormat, ShardEntry
from data.indexing.splits import splits_of_folders
from data.limits import IMAGE_BYTES, LABEL_BYTES
from data.remote.storage import Storage, is_remote, join, pieces
from data.shard import SampleMembers, group_members, split_key, split_members
from data.tar import NO_END_MARK, SEVERAL_TARS, TarContents, read_tar

_LOCAL_PIECE = 4 * 2**20  # bytes
START = 64
"""Bytes at the start of a file that tell what it is."""
_NO_SUCH_CLASS = -2
IMAGE, LABEL = 1, 2
"""Flags of `ShardScan.sample_members`."""
_ORDINARY_EXTENSION = re.compile(r"[a-z][a-z0-9_]{0,15}(\.[a-z][a-z0-9_]{0,15})?")

IMAGE_FORMATS = ("JPEG", "PNG", "WebP")


class Problem(StrEnum):
    """Why a sample cannot be used."""

    NO_IMAGE = "no image"
    NO_LABEL = "no label"
    LABEL_UNREADABLE = "an unreadable label"
    LABEL_UNKNOWN = "a label that is not in the class list"
    KEY_REPEATED = "a repeated key"
    IMAGE_EMPTY = "an empty image"
    IMAGE_GZIP = "an image that is compressed with gzip (build shards from these, which unpacks it)"
    IMAGE_UNKNOWN = "an image that is neither JPEG, PNG nor WebP"
    IMAGE_BROKEN = "an image that does not decode"


class SampleProblem(NamedTuple):
    """A problem with one sample: its place in the shard, its key, and details, which may be empty."""

    problem: Problem
    place: int
    key: str
    detail: str


class LabelRows(NamedTuple):
    """The labels of the samples of a shard as positions in a class list."""

    rows: NDArray[np.int32]
    """(samples, k), ascending, padded with -1."""
    unknown: list[SampleProblem]
    """Samples with a label that is not in the list, which get none."""
    ignored: NDArray[np.bool_]
    """(samples,) which samples have only labels that are ignored."""


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
    other_members: Accounting
    """The members that belong to no sample; the other ones are counted as found as well."""
    remarks: dict[str, str]
    """Kind -> what is unusual about the tar, although it is whole."""
    sample_members: NDArray[np.uint8]
    """(samples,) what each sample has: IMAGE, LABEL or both."""
    repeated_labels: int
    """Samples with the same label more than once."""
    hot_lengths: frozenset[int]
    """Lengths of the multi-hot lists."""
    key_hashes: NDArray[np.int64]
    """Of the different keys; only valid within this process."""
    packed_keys: bytes
    splits: dict[str, str]
    """Part of a dataset, such as training, that folders in the names of members tell of -> the first such key."""

    @property
    def keys(self) -> list[str]:
        """The key of each sample."""
        text = zlib.decompress(self.packed_keys).decode("utf-8", "surrogateescape")
        return text.split("\0") if self.entry.samples else []

    def samples_with(self, value: Any) -> int:
        """How many samples have this label, as it is stored."""
        if value not in self.label_values:
            return 0
        return int((self.label_places == self.label_values.index(value)).any(axis=1).sum())

    def labels(self, numbers: Mapping[Any, int]) -> LabelRows:
        """The labels as class numbers by `numbers`, see `class_numbers`."""
        classes = np.array([*(numbers.get(value, _NO_SUCH_CLASS) for value in self.label_values), -1], np.int32)
        rows = classes[self.label_places]
        unknown = np.flatnonzero((rows == _NO_SUCH_CLASS).any(axis=1))
        problems = []
        keys = self.keys if len(unknown) else []
        for place in unknown.tolist():
            value = self.label_values[self.label_places[place][rows[place] == _NO_SUCH_CLASS][0]]
            problems.append(SampleProblem(Problem.LABEL_UNKNOWN, place, keys[place], repr(value)[:60]))
        has_label: NDArray[np.bool_] = np.asarray((self.label_places >= 0).any(axis=1))
        has_label[unknown] = False
        ignored = np.logical_and(has_label, (rows < 0).all(axis=1))
        rows[unknown] = -1
        # The padding goes last: as an unsigned number it is the greatest.
        return LabelRows(np.sort(rows.view(np.uint32), axis=1).view(np.int32), problems, ignored)


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
                contents = read_tar(file.fileno())
                samples = group_members(contents.members, self.image_fields, self.label.field)
                entry = ShardEntry(name, len(samples), length, sha256.hexdigest())
                return self._scan_samples(file.fileno(), entry, contents, samples)
        except FileNotFoundError:
            raise DataError(f"shard {location}: it was listed but is missing now; copy it back and try again") from None
        finally:
            if remote:
                path.unlink(missing_ok=True)

    def _scan_samples(
        self, descriptor: int, entry: ShardEntry, contents: TarContents, samples: list[SampleMembers]
    ) -> ShardScan:
        problems: list[SampleProblem] = []
        formats: Counter[tuple[str, str]] = Counter()
        value_places: dict[Any, int] = {}
        labels: list[list[int]] = []
        repeated_labels = 0
        hot_lengths: set[int] = set()
        seen: dict[str, None] = {}
        for place, (key, image, label_member) in enumerate((g.key, g.image, g.label) for g in samples):

            def note(problem: Problem, detail: str = "", place: int = place, key: str = key) -> None:
                problems.append(SampleProblem(problem, place, key, detail))

            if key in seen:
                note(Problem.KEY_REPEATED)
            seen[key] = None
            row: list[int] = []
            if label_member is None:
                note(Problem.NO_LABEL)
            else:
                try:
                    read = min(label_member.size, LABEL_BYTES + 1)
                    stored = stored_labels(os.pread(descriptor, read, label_member.offset), self.label)
                    given = label_values(stored, self.label)
                    different = dict.fromkeys(given)
                    row = [value_places.setdefault(value, len(value_places)) for value in different]
                    repeated_labels += len(different) < len(given)
                    if self.label.lists == "multi-hot":
                        hot_lengths.add(len(stored))
                except ValueError as error:
                    note(Problem.LABEL_UNREADABLE, str(error))
            labels.append(row)
            if image is None:
                note(Problem.NO_IMAGE)
                continue
            if image.size > IMAGE_BYTES:
                note(Problem.IMAGE_BROKEN, f"more than {IMAGE_BYTES:,} bytes")
                continue
            encoded = os.pread(descriptor, image.size if self.decode_images else SIGNATURE, image.offset)[: image.size]
            kind = _format(encoded)
            formats[_image_field(image.name, self.image_fields), kind] += 1
            if not encoded:
                note(Problem.IMAGE_EMPTY)
            elif kind == "gzip":
                note(Problem.IMAGE_GZIP)
            elif kind not in IMAGE_FORMATS:
                note(Problem.IMAGE_UNKNOWN, "" if kind == "unknown" else f"it is {kind}")
            elif self.decode_images:
                try:
                    decode(encoded)
                except DecodeError as error:
                    note(Problem.IMAGE_BROKEN, str(error))
        places = np.full((len(samples), max(map(len, labels), default=0) or 1), -1, np.int32)
        for place, row in enumerate(labels):
            places[place, : len(row)] = row
        return ShardScan(
            entry=entry,
            damage=_describe_damage(descriptor, contents.damage),
            problems=problems,
            label_values=tuple(value_places),
            label_places=places,
            formats=formats,
            other_members=_other_members(contents, entry.name, self.image_fields, self.label.field),
            remarks=_remarks(contents),
            sample_members=np.array(
                [(g.image is not None) * IMAGE + (g.label is not None) * LABEL for g in samples], np.uint8
            ),
            repeated_labels=repeated_labels,
            hot_lengths=frozenset(hot_lengths),
            key_hashes=np.array([hash(key) for key in seen], np.int64),
            packed_keys=zlib.compress("\0".join(g.key for g in samples).encode("utf-8", "surrogateescape"), 1),
            splits=splits_of_folders(seen),
        )


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
    kind = other_file(os.pread(descriptor, START, 0))
    return kind if kind and kind.startswith("compressed") else f"{damage}; it is {kind}" if kind else damage


def other_file(start: bytes) -> str | None:
    """What the first `START` bytes show that a file is instead of a tar, with the fix; None if that is not known."""
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS instead of the file; get it with: git lfs pull"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page or an error message of a server instead of the file; download it again"
    if name := compression(start):
        return f"compressed with {name}; shards are uncompressed tars: decompress it"
    return None


def _image_field(name: str, image_fields: tuple[str, ...]) -> str:
    split = split_key(name)
    return split[1] if split and split[1] in image_fields else name.rpartition(".")[2].lower()


def _other_members(contents: TarContents, shard: str, image_fields: tuple[str, ...], label_field: str) -> Accounting:
    """All members are found; those that are neither image nor label are left out."""
    accounting = Accounting("members", len(contents.members) + len(contents.others))
    splits = split_members(contents.members, image_fields, label_field)
    for member, split in zip(contents.members, splits, strict=True):
        if split is None:
            accounting.leave_out(_why_other(member.name), f"{shard}: {member.name}")
    for name, kind in contents.others:
        accounting.leave_out(kind, f"{shard}: {name}")
    return accounting


def _why_other(name: str) -> str:
    base = name.rpartition("/")[2]
    if is_hidden(base):
        return "hidden files"
    split = split_key(name)
    if split is None:
        return "names without an extension"
    if not _ORDINARY_EXTENSION.fullmatch(split[1]):
        return "names with further dots that belong to no clear sample" if "." in split[1] else "unusual extensions"
    return f"{split[1]} members, neither images nor labels"


def _remarks(contents: TarContents) -> dict[str, str]:
    remarks = {}
    if not contents.has_end and contents.damage is None:
        remarks[NO_END_MARK] = "has no end mark, but ends behind a whole member"
    if contents.archives > 1:
        remarks[SEVERAL_TARS] = f"is {contents.archives} tars behind one another, which are all read"
    return remarks


def _format(encoded: bytes) -> str:
    """One of `IMAGE_FORMATS`, another that is known, "gzip", "unknown" or "empty"."""
    if not encoded:
        return "empty"
    return image_format(encoded) or ("gzip" if compression(encoded) == "gzip" else "unknown")
