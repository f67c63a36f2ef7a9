"""An index for WebDatasets that others built, in one parallel pass over shards that stay as they are."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError, StorageRefused
from data.index import FILE_NAME, LABELS_NAME, VERSION, LabelFormat, ShardIndex, index_version, labels_file
from data.indexing.inference import Fields, GivenFields, ShardHead, infer_fields, read_beginning
from data.indexing.pattern import ShardFiles, find_shards
from data.indexing.scan import Found, Problem, ShardScan, class_numbers, scan_shard, scanned_in_parallel
from data.storage import Storage, absolute, check_writable, join, read_bytes, write_bytes

MOST_CLASSES = 1_000_000
"""A label beyond it is no class number but something else, such as an image's."""
_NAMED = 3  # of each problem
_FIRST_SHARDS = 5  # that are tried when guessing


@dataclass(slots=True)
class Problems:
    """Samples that cannot be used: how many of each problem, and the first few."""

    samples: int = 0
    counts: Counter[Problem] = field(default_factory=Counter)
    first: dict[Problem, list[tuple[str, str, str]]] = field(default_factory=dict)
    """Problem -> shard, key and details."""

    def add(self, shard: str, found: Sequence[Found]) -> None:
        """Count the problems of one shard."""
        self.samples += len({one.place for one in found})
        for one in found:
            self.counts[one.problem] += 1
            named = self.first.setdefault(one.problem, [])
            if len(named) < _NAMED:
                named.append((shard, one.key, one.detail))


@dataclass(frozen=True, slots=True)
class IndexingReport:
    """What was adopted, and what is wrong with it."""

    index: ShardIndex
    inferred: list[str]
    problems: Problems
    left_out: dict[str, str]
    """Broken shard -> why."""
    formats: Counter[tuple[str, str]]
    """(extension, format by the first bytes) -> images."""
    repeated_keys: int
    """Keys that stand in more than one shard."""
    repeated_key: tuple[str, str, str] | None
    """The first of them and two of its shards."""


def index_shards(
    patterns: Sequence[str],
    *,
    said: GivenFields = GivenFields(),  # noqa: B008 (immutable)
    classes: tuple[str, ...] | None = None,
    output: str | None = None,
    overwrite: bool = False,
    skip_broken_shards: bool = False,
    storage: Storage = Storage(),  # noqa: B008 (immutable)
    threads: int = 4,
    begin: Callable[[int], None] = lambda total: None,
    progress: Callable[[int], None] = lambda count: None,
) -> IndexingReport:
    """Index the shards that `patterns` name and publish `labels.npy` and `index.json`.

    The index depends on the shards and options alone, not on `threads`. Samples with problems keep their places; who
    reads them skips and replaces them by rule.

    Args:
        patterns: see `find_shards`.
        said: what the members are; the rest is inferred from the first shard.
        classes: names in the order of the labels; by default the numbers up to the greatest label, or the sorted names.
        output: folder for the index; by default that of the shards.
        overwrite: replace an index of this version.
        skip_broken_shards: leave out shards that are no whole tars or hold no samples.
        begin: called with the bytes of all shards.
        progress: called by all threads with numbers of bytes that were read.

    Raises:
        DataError: patterns that name no shards, members that cannot be understood, broken shards, no sample that can be
            used, an index that is there already, or a folder that cannot be written.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    files = find_shards(patterns, storage)
    home = absolute(output or files.folder)
    if not overwrite:
        _refuse_existing(home, storage)
    _refuse_unwritable(home, storage)
    fields = _inferred(files, said, storage)
    begin(sum(files.sizes.values()))

    def examine_one(item: tuple[str, int], temporary: Path) -> ShardScan:
        name, size = item
        return scan_shard(
            files.folder, name, size, fields.image_fields, fields.label, storage, temporary, progress=progress
        )

    scans: list[ShardScan] = []
    broken: dict[str, str] = {}
    for scan in scanned_in_parallel(examine_one, files.sizes.items(), threads):
        damage = scan.damage or (None if scan.entry.samples else "it has no samples with these members")
        if damage is None:
            scans.append(scan)
        else:
            broken[scan.entry.name] = damage
    if broken and not (skip_broken_shards and scans):
        listing = "; ".join(f"{name} ({why})" for name, why in list(broken.items())[:5])
        raise DataError(
            f"{files.folder}: {len(broken):,} of {len(files.sizes):,} shards are broken: {listing}"
            f"{' ...' if len(broken) > 5 else ''}. Copy them again, or leave them out with --skip-broken-shards"
        )
    if classes is None:
        classes = _class_list(scans, fields.label)
    labels, problems = _merged(scans, class_numbers(classes, fields.label))
    formats = sum((scan.formats for scan in scans), Counter[tuple[str, str]]())
    content, sha256 = labels_file(labels)
    index = ShardIndex(
        folder=files.folder,
        classes=classes,
        image_fields=tuple(n for n in fields.image_fields if any(n == seen for seen, _ in formats)),
        label=fields.label,
        shards=tuple(scan.entry for scan in scans),
        labels_per_sample=labels.shape[1],
        labels_sha256=sha256,
        home=home,
    )
    if problems.samples == index.samples:
        problem, ((shard, key, detail), *_) = next(iter(problems.first.items()))
        raise DataError(
            f"{files.folder}: none of {index.samples:,} samples can be used; the first, {key} of {shard}, has {problem}"
            f"{f' ({detail})' if detail else ''}; see --image-field, --label-field, --label-key, --label-by, --classes"
        )
    write_bytes(join(home, LABELS_NAME), content, storage)
    index.write(storage)
    return IndexingReport(index, fields.inferred, problems, broken, formats, *_repeated_keys(scans))


def _refuse_existing(home: str, storage: Storage) -> None:
    path = join(home, FILE_NAME)
    try:
        version = index_version(read_bytes(path, storage))
    except (FileNotFoundError, NotADirectoryError):
        return
    if version is None:
        raise DataError(f"{path}: already exists and is not an index of shards; choose another folder with --output")
    if version not in range(VERSION):
        raise DataError(
            f"{path}: already exists; compare the shards with it by coatnet shards verify, or replace it with "
            "--overwrite"
        )


def _refuse_unwritable(home: str, storage: Storage) -> None:
    try:
        check_writable(home, storage)
    except StorageRefused as error:
        raise StorageRefused(f"{error}; or write the index elsewhere with --output") from error
    except (OSError, NotImplementedError) as error:
        raise DataError(
            f"{home}: the index cannot be written there ({error}); choose another folder with --output"
        ) from error


def _inferred(files: ShardFiles, said: GivenFields, storage: Storage) -> Fields:
    """From the first shard that can be read."""
    beginning = ShardHead(files.folder)
    for name in list(files.sizes)[:_FIRST_SHARDS]:
        beginning = read_beginning(join(files.folder, name), storage, said.label_field)
        if beginning.extensions:
            return infer_fields(beginning, said)
    raise DataError(f"{beginning.location}: not a tar with samples, nor are those before it; are these WebDatasets?")


def _class_list(scans: list[ShardScan], label: LabelFormat) -> tuple[str, ...]:
    found = {value for scan in scans for value in scan.label_values}
    if label.by == "name":
        return tuple(sorted(found))
    greatest = max(found, default=-1)
    if greatest >= MOST_CLASSES:
        raise DataError(
            f"the label {greatest} would make {greatest + 1:,} classes; if labels are names give --label-by name, else "
            "give the names of the classes with --classes"
        )
    return tuple(str(number) for number in range(greatest + 1))


def _merged(scans: list[ShardScan], numbers: Mapping[Any, int]) -> tuple[NDArray[np.int32], Problems]:
    """The labels (N, k) of all samples, and all problems."""
    width = max((scan.label_places.shape[1] for scan in scans), default=1)
    labels = np.full((sum(scan.entry.samples for scan in scans), width), -1, np.int32)
    problems = Problems()
    start = 0
    for scan in scans:
        rows, unknown = scan.labels(numbers)
        labels[start : start + len(rows), : rows.shape[1]] = rows
        start += len(rows)
        problems.add(scan.entry.name, [*scan.found, *unknown])
    most = int((labels >= 0).sum(axis=1).max(initial=1))
    return np.ascontiguousarray(labels[:, : max(most, 1)]), problems


def _repeated_keys(scans: list[ShardScan]) -> tuple[int, tuple[str, str, str] | None]:
    """How many keys stand in more than one shard; the first of them with its first two shards."""
    hashes = np.concatenate([scan.key_hashes for scan in scans])
    shards = np.repeat(np.arange(len(scans)), [len(scan.key_hashes) for scan in scans])
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order][1:] == hashes[order][:-1]]
    if not len(again):
        return 0, None
    repeated = set(hashes[again].tolist())
    for scan in scans:
        for key in scan.keys:
            if hash(key) in repeated:
                first, second = shards[hashes == hash(key)][:2].tolist()
                return len(repeated), (key, scans[first].entry.name, scans[second].entry.name)
    raise AssertionError("the keys do not fit their hashes")
