"""Comparing shards with their index; every byte is read again."""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.accounting import Accounting
from data.classes.labels import class_numbers
from data.errors import DataError, StorageRefused
from data.index import LABELS_NAME, ShardEntry, ShardIndex, read_labels
from data.indexing.account import account_members
from data.indexing.pattern import is_shard
from data.indexing.remarks import remark_on
from data.indexing.scan import ScanOptions, ShardScan, ShardScanner
from data.remote.storage import join, list_files, named_sizes


class Difference(NamedTuple):
    """What differs, in which shard and which sample; both are empty if it concerns all of them."""

    shard: str
    key: str
    what: str


def verify_shards(
    index: ShardIndex,
    *,
    decode_images: bool = False,
    scanning: ScanOptions = ScanOptions(),  # noqa: B008 (immutable)
    members: Accounting | None = None,
) -> Iterator[Difference]:
    """Differences between the shards and `index`, in its order: presence, size, sha256, samples, labels, `labels.npy`.

    With `decode_images` every image is decoded, and unusable samples are reported as well; without it they are not, as
    an indexed dataset may have some. The members of the shards are counted in `members`, with the
    remarks of `index_shards`.

    Raises:
        DataError: the folder of the shards is missing, or a shard vanished.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    try:
        sizes = named_sizes(index.folder, [shard.name for shard in index.shards], scanning.storage)
    except FileNotFoundError:
        raise DataError(
            f"{index.folder}: no such folder; the index in {index.home} expects the shards there: move them back, "
            f"or index them again with: coatnet shards index FOLDER --output {index.home} --overwrite"
        ) from None
    labels: NDArray[np.int32] | None = None
    if index.labels_sha256 is not None:
        try:
            labels = read_labels(index, scanning.storage)
        except DataError as error:
            yield Difference("", "", str(error))
    scanning.begin(sum(sizes.get(shard.name, 0) for shard in index.shards))

    scanner = ShardScanner(index.folder, index.image_fields, index.label, scanning, decode_images)
    numbers = class_numbers(index.classes, index.label)
    start = 0
    read: list[ShardScan] = []
    scans = scanner.scan_all((shard.name, sizes.get(shard.name)) for shard in index.shards)
    for entry, scan in zip(index.shards, scans, strict=True):
        if scan is None:
            yield Difference(entry.name, "", "is missing")
        else:
            yield from _file_differences(entry, scan)
            found = scan.labels(numbers)
            rows, unknown, _ = found
            if members is not None:
                members.add(account_members(scan, found))
                read.append(scan)
            if labels is not None and len(rows) == entry.samples:
                yield from _label_differences(index, entry, scan, rows, labels[start : start + entry.samples])
            if decode_images:
                for problem, _, key, detail in sorted([*scan.problems, *unknown], key=lambda problem: problem.place):
                    yield Difference(entry.name, key, f"has {problem}{f' ({detail})' if detail else ''}")
        start += entry.samples
    if members is not None and labels is not None:
        remark_on(members, index, labels, read)
    if members is not None:
        _remark_on_other_tars(members, index, scanning)


def _remark_on_other_tars(members: Accounting, index: ShardIndex, scanning: ScanOptions) -> None:
    """On tars beside the shards, which may have come later. Web servers need not list them."""
    if index.folder.startswith("http"):
        return
    known = {shard.name for shard in index.shards}
    others: list[str] = []
    for folder in sorted({shard.name.rpartition("/")[0] for shard in index.shards}):
        place = join(index.folder, folder) if folder else index.folder
        with suppress(FileNotFoundError, StorageRefused):
            found = sorted(list_files(place, scanning.storage))
            names = [f"{folder}/{name}" if folder else name for name in found if is_shard(name)]
            others += [name for name in names if name not in known]
    if others:
        members.remark(
            "not_indexed",
            f"{len(others):,} tars beside the shards are not in the index ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); if they belong to the dataset, index it again",
        )


def _file_differences(entry: ShardEntry, scan: ShardScan) -> Iterator[Difference]:
    there = scan.entry
    if there.bytes != entry.bytes:
        yield Difference(entry.name, "", f"has {there.bytes:,} bytes, {entry.bytes:,} in the index")
    elif there.sha256 != entry.sha256:
        yield Difference(entry.name, "", f"has the sha256 {there.sha256[:16]}..., {entry.sha256[:16]}... in the index")
    if scan.damage:
        yield Difference(entry.name, "", f"is damaged: {scan.damage}")
    elif there.samples < entry.samples:
        yield from (Difference(entry.name, "", remark) for remark in scan.remarks.values())
    if there.samples != entry.samples:
        yield Difference(entry.name, "", f"has {there.samples:,} samples, {entry.samples:,} in the index")


def _label_differences(
    index: ShardIndex, entry: ShardEntry, scan: ShardScan, rows: NDArray[np.int32], expected: NDArray[np.int32]
) -> Iterator[Difference]:
    width = max(rows.shape[1], expected.shape[1])
    both = [np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-1) for array in (rows, expected)]
    different = np.flatnonzero((both[0] != both[1]).any(axis=1))
    keys = scan.keys if len(different) else []
    for place in different.tolist():
        names = [_names(index, array[place]) for array in both]
        yield Difference(entry.name, keys[place], f"has the label {names[0]}, {names[1]} in {LABELS_NAME}")


def _names(index: ShardIndex, row: NDArray[np.int32]) -> str:
    return ", ".join(index.classes[number] for number in row.tolist() if number >= 0) or "none"
