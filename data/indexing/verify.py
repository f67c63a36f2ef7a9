"""Shards held against their index: every byte read again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.index import LABELS_NAME, ShardEntry, ShardIndex, read_labels
from data.indexing.scan import Problem, ShardScan, class_numbers, scan_shard, scanned_in_parallel
from data.storage import Storage, list_files


class Difference(NamedTuple):
    """What is wrong: with which shard, and with which sample of it; both empty where it is with all."""

    shard: str
    key: str
    what: str


def verify_shards(
    index: ShardIndex,
    *,
    decode_images: bool = False,
    storage: Storage = Storage(),  # noqa: B008 (immutable)
    threads: int = 4,
    begin: Callable[[int], None] = lambda total: None,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Difference]:
    """What of the shards differs from `index`, in its order: presence, size, sha256, samples, labels, `labels.npy`.

    With `decode_images` every image is decoded, and samples that cannot be used are told too; without it they are not,
    as an adopted dataset may have some.

    Raises:
        DataError: the shards' folder or a shard vanished.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    try:
        sizes = list_files(index.folder, storage, below=any("/" in shard.name for shard in index.shards))
    except FileNotFoundError:
        raise DataError(f"{index.folder}: no such folder, and the shards should lie in it") from None
    labels: NDArray[np.int32] | None = None
    if index.labels_sha256 is not None:
        try:
            labels = read_labels(index, storage)
        except DataError as error:
            yield Difference("", "", str(error))
    begin(sum(sizes.get(shard.name, 0) for shard in index.shards))

    def examine_one(entry: ShardEntry, temporary: Path) -> ShardScan | ShardEntry:
        if entry.name not in sizes:
            return entry
        return scan_shard(
            index.folder, entry.name, sizes[entry.name], index.image_fields, index.label, storage, temporary,
            decode_images=decode_images, progress=progress,
        )  # fmt: skip

    numbers = class_numbers(index.classes, index.label)
    start = 0
    for entry, scan in zip(index.shards, scanned_in_parallel(examine_one, index.shards, threads), strict=True):
        if isinstance(scan, ShardEntry):
            yield Difference(entry.name, "", "is missing")
        else:
            yield from _of_bytes(entry, scan)
            rows, unknown = scan.labels(numbers)
            if labels is not None and len(rows) == entry.samples:
                yield from _of_labels(index, entry, scan, rows, labels[start : start + entry.samples])
            if decode_images:
                for found in sorted([*scan.found, *unknown], key=lambda found: found.place):
                    yield Difference(entry.name, found.key, _in_words(found.problem, found.detail))
        start += entry.samples


def _of_bytes(entry: ShardEntry, scan: ShardScan) -> Iterator[Difference]:
    there = scan.entry
    if there.bytes != entry.bytes:
        yield Difference(entry.name, "", f"has {there.bytes:,} bytes, {entry.bytes:,} in the index")
    elif there.sha256 != entry.sha256:
        yield Difference(entry.name, "", f"has the sha256 {there.sha256[:16]}..., {entry.sha256[:16]}... in the index")
    if scan.damage:
        yield Difference(entry.name, "", f"is damaged: {scan.damage}")
    if there.samples != entry.samples:
        yield Difference(entry.name, "", f"has {there.samples:,} samples, {entry.samples:,} in the index")


def _of_labels(
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


def _in_words(problem: Problem, detail: str) -> str:
    return f"has {problem}{f' ({detail})' if detail else ''}"
