"""Indexing existing WebDatasets in one parallel pass over their shards, which are not modified."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError, StorageRefused
from data.index import FILE_NAME, LABELS_NAME, VERSION, LabelFormat, ShardIndex, index_version, labels_file
from data.indexing.inference import Fields, GivenFields, infer_fields, read_head
from data.indexing.pattern import ShardFiles, find_shards
from data.indexing.scan import Problem, SampleProblem, ScanOptions, ShardScan, ShardScanner, class_numbers
from data.storage import Storage, absolute, check_writable, join, read_bytes, write_bytes

MOST_CLASSES = 1_000_000
"""A number beyond it is not a class but something else, such as the id of an image."""
_EXAMPLES = 3  # of each problem
_SHARDS_TRIED = 5  # by the inference of fields


@dataclass(slots=True)
class ProblemCounts:
    """Unusable samples: how many have each problem, and the first few of them."""

    samples: int = 0
    counts: Counter[Problem] = field(default_factory=Counter)
    first: dict[Problem, list[tuple[str, str, str]]] = field(default_factory=dict)
    """Problem -> shard, key and details."""

    def add(self, shard: str, problems: Sequence[SampleProblem]) -> None:
        """Count the problems of one shard."""
        self.samples += len({problem.place for problem in problems})
        for kind, _, key, detail in problems:
            self.counts[kind] += 1
            examples = self.first.setdefault(kind, [])
            if len(examples) < _EXAMPLES:
                examples.append((shard, key, detail))


@dataclass(frozen=True, slots=True)
class IndexingReport:
    """What was indexed, what was inferred, and the problems found."""

    index: ShardIndex
    inferred: list[str]
    problems: ProblemCounts
    left_out: dict[str, str]
    """Broken shard -> why."""
    formats: Counter[tuple[str, str]]
    """(extension, format by the first bytes) -> images."""
    repeated_keys: int
    """Number of keys that occur in more than one shard."""
    repeated_key: tuple[str, str, str] | None
    """The first of them, and two of its shards."""


def index_shards(
    patterns: Sequence[str],
    *,
    given: GivenFields = GivenFields(),  # noqa: B008 (immutable)
    classes: tuple[str, ...] | None = None,
    output: str | None = None,
    overwrite: bool = False,
    skip_broken_shards: bool = False,
    scanning: ScanOptions = ScanOptions(),  # noqa: B008 (immutable)
) -> IndexingReport:
    """Index the shards that match `patterns` and publish `labels.npy` and `index.json`.

    The index depends only on the shards and options, not on the number of threads. Samples with problems keep their
    places; a run skips and replaces them.

    Args:
        patterns: see `find_shards`.
        given: what the members are, as far as it is known; the rest is inferred from the first shard.
        classes: names in the order of the labels; by default the numbers up to the greatest label, or the sorted names.
        output: folder for the index; by default that of the shards.
        overwrite: replace an index of this version.
        skip_broken_shards: leave out shards that are damaged or have no samples.
        scanning: how the shards are read.

    Raises:
        DataError: patterns that match no shards, fields that cannot be inferred, broken shards, no usable sample, an
            existing index, or a folder that cannot be written.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    storage = scanning.storage
    files = find_shards(patterns, storage)
    home = absolute(output or files.folder)
    if not overwrite:
        _refuse_existing(home, storage)
    _refuse_unwritable(home, storage)
    fields = _inferred_fields(files, given, storage)
    scanning.begin(sum(files.sizes.values()))

    scans: list[ShardScan] = []
    broken: dict[str, str] = {}
    scanner = ShardScanner(files.folder, fields.image_fields, fields.label, scanning)
    for scan in filter(None, scanner.scan_all(files.sizes.items())):
        damage = scan.damage or (None if scan.entry.samples else "it has no samples with these fields")
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
    labels, problems = _merge(scans, class_numbers(classes, fields.label))
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
            f"{files.folder}: none of {index.samples:,} samples is usable; the first, {key} of {shard}, has {problem}"
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


def _inferred_fields(files: ShardFiles, given: GivenFields, storage: Storage) -> Fields:
    """From the first readable shard."""
    names = list(files.sizes)[:_SHARDS_TRIED]
    for name in names:
        head = read_head(join(files.folder, name), storage, given.label_field)
        if head.extensions:
            return infer_fields(head, given)
    raise DataError(
        f"{join(files.folder, names[-1])}: not a tar with samples, nor are those before it; are these WebDatasets?"
    )


def _class_list(scans: list[ShardScan], label: LabelFormat) -> tuple[str, ...]:
    found = {value for scan in scans for value in scan.label_values}
    if label.by == "name":
        return tuple(sorted(found))
    greatest = max(found, default=-1)
    if greatest >= MOST_CLASSES:
        raise DataError(
            f"the label {greatest} would make {greatest + 1:,} classes; if labels are names use --label-by name, "
            "otherwise pass the class names with --classes"
        )
    return tuple(str(number) for number in range(greatest + 1))


def _merge(scans: list[ShardScan], numbers: Mapping[Any, int]) -> tuple[NDArray[np.int32], ProblemCounts]:
    """The labels (N, k) of all samples, and all problems."""
    width = max((scan.label_places.shape[1] for scan in scans), default=1)
    labels = np.full((sum(scan.entry.samples for scan in scans), width), -1, np.int32)
    problems = ProblemCounts()
    start = 0
    for scan in scans:
        rows, unknown = scan.labels(numbers)
        labels[start : start + len(rows), : rows.shape[1]] = rows
        start += len(rows)
        problems.add(scan.entry.name, [*scan.problems, *unknown])
    most = int((labels >= 0).sum(axis=1).max(initial=1))
    return np.ascontiguousarray(labels[:, : max(most, 1)]), problems


def _repeated_keys(scans: list[ShardScan]) -> tuple[int, tuple[str, str, str] | None]:
    """How many keys occur in more than one shard; the first of them with its first two shards."""
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
    raise AssertionError("keys do not match their hashes")
