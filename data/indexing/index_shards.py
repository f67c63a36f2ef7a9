"""Indexing existing WebDatasets in one parallel pass over their shards, which are not modified."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.accounting import REPORT_NAME, Accounting
from data.classes.class_lists import ClassList
from data.classes.labels import class_number, class_numbers
from data.errors import DataError, StorageRefused
from data.files.json_records import to_json
from data.index import FILE_NAME, LABELS_NAME, VERSION, LabelFormat, ShardIndex, index_version, labels_file
from data.indexing.account import account_files, account_members
from data.indexing.inference import Fields, GivenFields, infer_fields, read_head
from data.indexing.pattern import ShardFiles, find_shards
from data.indexing.remarks import refuse_captions, remark_on
from data.indexing.scan import START, Problem, SampleProblem, ScanOptions, ShardScan, ShardScanner, other_file
from data.indexing.splits import refuse_several_splits, refuse_splits_in_shards
from data.limits import INDEX_BYTES
from data.remote.remote_file import open_file
from data.remote.storage import Storage, absolute, check_writable, join, read_bytes, write_bytes

MOST_CLASSES = 1_000_000
"""A number beyond it is not a class but something else, such as the id of an image."""
_EXAMPLES = 3  # of each problem
_BROKEN = "broken shards (--skip-broken-shards)"
_SCATTERED = "; the members of a sample must follow each other, as in a tar made with --sort=name"
_EMPTY = "tars without members"


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
    files: Accounting
    """The files in the folders of the shards."""
    members: Accounting
    """The members of the shards, with the remarks on the whole dataset."""
    problems: ProblemCounts
    left_out: dict[str, str]
    """Broken shard -> why."""
    formats: Counter[tuple[str, str]]
    """(extension, format by the first bytes) -> images."""
    repeated_keys: int
    """Number of keys that occur in more than one shard."""
    repeated_key: tuple[str, str, str] | None
    """The first of them, and two of its shards."""

    def document(self) -> dict[str, Any]:
        """What `--json` prints and `report.json` contains; the keys are documented in docs/indexing.md."""
        index = self.index
        return {
            **to_json(self.members),
            "files": to_json(self.files),
            "datasets": [
                {
                    "folder": index.home,
                    "shards_folder": index.folder,
                    "images": index.samples,
                    "unusable": self.problems.samples,
                    "classes": len(index.classes),
                    "labels_per_sample": index.labels_per_sample,
                    "label": index.label.content(),
                    "image_fields": list(index.image_fields),
                    "shards": len(index.shards),
                    "bytes": index.bytes,
                    "digest": index.digest,
                }
            ],
            "problems": {
                str(problem): {
                    "samples": count,
                    "first": [
                        dict(zip(("shard", "key", "detail"), one, strict=True)) for one in self.problems.first[problem]
                    ],
                }
                for problem, count in self.problems.counts.items()
            },
            "formats": {f"{kind} in {field}": count for (field, kind), count in self.formats.most_common()},
            "inferred": self.inferred,
            "broken_shards": self.left_out,
            "keys_in_several_shards": self.repeated_keys,
        }


def index_shards(
    patterns: Sequence[str],
    *,
    given: GivenFields = GivenFields(),  # noqa: B008 (immutable)
    classes: ClassList | None = None,
    output: str | None = None,
    overwrite: bool = False,
    skip_broken_shards: bool = False,
    mix_splits: bool = False,
    decode_images: bool = False,
    scanning: ScanOptions = ScanOptions(),  # noqa: B008 (immutable)
) -> IndexingReport:
    """Index the shards that match `patterns` and publish `labels.npy`, `report.json` and `index.json`.

    The index depends only on the shards and options, not on the number of threads. Samples with problems keep their
    places; a run skips and replaces them.

    Args:
        patterns: see `find_shards`.
        given: what the members are, as far as it is known; the rest is inferred from the first shard.
        classes: names in the order of the labels; by default the numbers up to the greatest label, or the sorted names.
        output: folder for the index; by default that of the shards.
        overwrite: replace an index of this version.
        skip_broken_shards: leave out shards that are damaged or have members but no samples.
        mix_splits: index shards of several splits, such as training and validation, as one dataset.
        decode_images: decode every image, so that those that are damaged are known and training can decode crops alone.
        scanning: how the shards are read.

    Raises:
        DataError: patterns that match no shards or several splits, fields that cannot be inferred, labels that may mean
            several things, broken shards, no usable sample, an existing index, or a folder that cannot be written.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    storage = scanning.storage
    files = find_shards(patterns, storage)
    if not mix_splits:
        refuse_several_splits(patterns, files)
    home = absolute(output or files.folder)
    if not overwrite:
        _refuse_existing(home, storage)
    _refuse_unwritable(home, storage)
    fields = _inferred_fields(files, given, storage)
    scanning.begin(sum(files.sizes.values()))

    scans: list[ShardScan] = []
    broken: dict[str, str] = {}
    empty: list[str] = []
    scanner = ShardScanner(files.folder, fields.image_fields, fields.label, scanning, decode_images)
    for scan in filter(None, scanner.scan_all(files.sizes.items())):
        damage = scan.damage
        if damage is None and not scan.entry.samples:
            if not scan.other_members.found:
                empty.append(scan.entry.name)
                continue
            damage = "it has no samples with these fields"
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
    if not mix_splits:
        refuse_splits_in_shards(files.folder, ((scan.entry.name, scan.splits) for scan in scans))
    names = _class_list(files.folder, scans, fields.label, classes, given)
    members = Accounting("members")
    labels, problems = _merge(scans, class_numbers(names, fields.label), members)
    formats = sum((scan.formats for scan in scans), Counter[tuple[str, str]]())
    content, sha256 = labels_file(labels)
    index = ShardIndex(
        folder=files.folder,
        classes=names,
        image_fields=tuple(n for n in fields.image_fields if any(n == seen for seen, _ in formats)),
        label=fields.label,
        shards=tuple(scan.entry for scan in scans),
        labels_per_sample=labels.shape[1],
        labels_sha256=sha256,
        home=home,
        images_decode=decode_images and Problem.IMAGE_BROKEN not in problems.counts,
    )
    if not members.taken and not problems.samples:
        raise DataError(f"{files.folder}: all samples have a label that --ignore-label leaves out")
    if not members.taken:
        problem, ((shard, key, detail), *_) = next(iter(problems.first.items()))
        raise DataError(
            f"{files.folder}: none of {index.samples:,} samples is usable; the first, {key} of {shard}, has {problem}"
            f"{f' ({detail})' if detail else ''}; see --image-field, --label-field, --label-key, --label-by, --classes"
            f"{_SCATTERED if Problem.KEY_REPEATED in problems.counts else ''}"
        )
    if classes is None and given.label_field is None and given.label_key is None:
        refuse_captions(index, labels)
    left_out = dict.fromkeys(broken, _BROKEN) | dict.fromkeys(empty, _EMPTY)
    remark_on(members, index, labels, scans)
    if classes is not None and index.label.by == "number" and index.classes != classes.names:
        members.remark(
            "equal_names",
            f"some names in {classes.location} are those of several classes; their numbers or ids are added to them",
        )
    report = IndexingReport(
        index,
        fields.inferred,
        account_files(files, left_out, storage),
        members,
        problems,
        broken,
        formats,
        *_repeated_keys(scans),
    )
    for accounting in (report.files, members):
        accounting.check()
    write_bytes(join(home, LABELS_NAME), content, storage)
    write_bytes(join(home, REPORT_NAME), (json.dumps(report.document(), indent=1) + "\n").encode(), storage)
    index.write(storage)
    return report


def _refuse_existing(home: str, storage: Storage) -> None:
    path = join(home, FILE_NAME)
    try:
        version = index_version(read_bytes(path, storage, most=INDEX_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return
    if version is None:
        raise DataError(f"{path}: already exists and is not an index of shards; choose another folder with --output")
    if version not in range(VERSION):
        raise DataError(
            f"{path}: already exists; compare the shards with it by coatnet shards verify, or replace it with "
            "--overwrite; the index of other shards needs a folder of its own: --output FOLDER"
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
    """From the first shard that has samples."""
    first, damage = next(iter(files.sizes)), None
    for name in files.sizes:
        head = read_head(join(files.folder, name), storage, given)
        if head.extensions:
            return infer_fields(head, given)
        damage = head.damage if damage is None else damage
    with open_file(join(files.folder, first), storage) as file:
        kind = other_file(file.read(START))
    why = f" ({damage})" if damage else ""
    raise DataError(
        f"{files.folder}: none of {len(files.sizes):,} tars has samples, from {first} on"
        f"{f', which is {kind}' if kind else f'{why}; are these WebDatasets?'}"
    )


def _class_list(
    folder: str, scans: list[ShardScan], label: LabelFormat, given: ClassList | None, options: GivenFields
) -> tuple[str, ...]:
    found = {value for scan in scans for value in scan.label_values}
    if label.by == "name":
        found -= set(label.ignored)
        return tuple(sorted(found)) if given is None else given.by_name(found)
    found -= {class_number(value) for value in label.ignored}
    lengths = sorted({length for scan in scans for length in scan.hot_lengths})
    if len(lengths) > 1:
        raise DataError(
            f"{folder}: multi-hot labels of different lengths, {lengths[0]:,} and {lengths[1]:,}; correct them"
        )
    if given is not None:
        names = given.by_number()
        if lengths and lengths != [len(names)]:
            raise DataError(f"{folder}: multi-hot labels of {lengths[0]:,} numbers, and {len(names):,} --classes")
        if options.first_label is None and found and (min(found), max(found)) == (1, len(names)):
            raise DataError(
                f"{folder}: the labels are 1 to {len(names):,}, and --classes has {len(names):,} names: if the first "
                "name is that of the label 1, use --first-label 1, otherwise --first-label 0"
            )
        return names
    greatest = label.first + lengths[0] - 1 if lengths else max(found, default=-1)
    if greatest >= MOST_CLASSES:
        if greatest >= 10**30:
            raise DataError(
                f"{folder}: a label of {len(str(greatest)):,} digits, {str(greatest)[:20]}..., is no class; correct "
                "it, or use --label-by name"
            )
        raise DataError(
            f"{folder}: the label {greatest} would make {greatest + 1:,} classes; if labels are names use --label-by "
            f"name, if it is none of the classes --ignore-label {greatest}, otherwise pass the names with --classes"
        )
    return tuple(str(number) for number in range(label.first, greatest + 1))


def _merge(
    scans: list[ShardScan], numbers: Mapping[Any, int], members: Accounting
) -> tuple[NDArray[np.int32], ProblemCounts]:
    """The labels (N, k) of all samples, and all problems; accounts for all members."""
    width = max((scan.label_places.shape[1] for scan in scans), default=1)
    labels = np.full((sum(scan.entry.samples for scan in scans), width), -1, np.int32)
    problems = ProblemCounts()
    start = 0
    for scan in scans:
        found = scan.labels(numbers)
        labels[start : start + len(found.rows), : found.rows.shape[1]] = found.rows
        start += len(found.rows)
        problems.add(scan.entry.name, [*scan.problems, *found.unknown])
        members.add(account_members(scan, found))
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
