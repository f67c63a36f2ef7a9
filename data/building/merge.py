"""From sorted runs to the finished dataset: shards written by several processes, labels, index, final rename."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.accounting import FIRST_NAMES, REPORT_NAME, Accounting, LeftOut
from data.building.build_folder import BuildFolder, ReadOptions, WriteOptions
from data.building.conversion import DIFFERENCES, Conversion, Kind
from data.building.report import (
    SAME_NAME,
    account,
    remark_on_classes,
    remark_on_conversion,
    remark_on_lost_classes,
    remark_on_validation,
)
from data.building.shard_plan import (
    Images,
    Int32,
    Int64,
    cuts,
    numbered,
    read_images,
    relabelled,
    repetitions,
    sample_bytes,
    shuffled,
    validation_mask,
    whole_numbers,
)
from data.building.shard_writer import ShardTask, finished_shard, write_shard
from data.building.source import BrokenInput
from data.building.webdataset import indexed_classes
from data.building.workers import Workers
from data.classes.class_lists import read_classes
from data.errors import DataError
from data.files.atomic_file import sync_folder, write_atomically
from data.files.json_records import to_json
from data.index import LABELS_NAME, LabelFormat, ShardEntry, ShardIndex, labels_file
from data.remote.storage import Storage
from data.text.printable import one_line


class BuildProgress(NamedTuple):
    """Progress of a build."""

    phase: str
    images: int
    """Read or written in this phase, including those of earlier calls."""
    bytes: int
    share: float
    """Share of this phase that is done, approximately, 0 .. 1."""
    kept: bool = False
    """Whether the last images counted were read or written by an earlier call."""


@dataclass(frozen=True, slots=True)
class BuildContext:
    """A build in progress: its folders and options, and the means to carry it out."""

    folder: BuildFolder
    destination: Path
    reading: ReadOptions
    writing: WriteOptions
    storage: Storage
    workers: Workers
    progress: Callable[[BuildProgress], None]


@dataclass(frozen=True, slots=True)
class KindCount:
    """Images that are not upright RGB JPEGs, and how they were handled."""

    kind: str
    images: int
    encoded_again: int
    """How many were converted to upright RGB JPEGs; the others are stored unchanged."""
    first: list[str]


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build has written."""

    indexes: dict[Path, ShardIndex]
    """By final folder; empty after a single part of a build."""
    images: int
    left_out: list[BrokenInput]
    kinds: list[KindCount]
    shrunk: int
    encoded_again: int
    """How many images were encoded again; the others have the bytes of the source, apart from restart markers."""
    marked: int
    """How many images were given restart markers."""
    unmarked: LeftOut
    """Those that cannot have them, if they were asked for."""
    conversion: Conversion
    """How they were to be converted."""
    accounting: Accounting
    """What became of every entry of the source."""

    def document(self) -> dict[str, Any]:
        """What `--json` prints and `report.json` contains: the accounting, and what was written.

        Folders are those below the destination, so that equal builds have equal files.
        """
        written = [
            {
                "folder": folder.name if len(self.indexes) > 1 else ".",
                "images": index.samples,
                "classes": len(index.classes),
                "shards": len(index.shards),
                "bytes": index.bytes,
            }
            for folder, index in self.indexes.items()
        ]
        kinds = [to_json(kind) for kind in self.kinds]
        counts = {
            "shrunk": self.shrunk,
            "encoded_again": self.encoded_again,
            "marked": self.marked,
            "unmarked": to_json(self.unmarked),
        }
        return {**to_json(self.accounting), "kinds": kinds, **counts, "datasets": written}


@dataclass(frozen=True, slots=True)
class _Split:
    """The training set, the validation set, or everything: shuffled images, labels, and bounds of its shards."""

    name: str
    images: Int64
    labels: Int32
    bytes: int
    cuts: list[tuple[int, int]]

    def paths(self, building: BuildFolder) -> list[Path]:
        """Of its shards."""
        prefix = self.name or "shard"
        return [building.shards / self.name / f"{prefix}-{number:06d}.tar" for number in range(len(self.cuts))]


def merge_runs(build: BuildContext, runs: list[str], listing: Accounting) -> BuildReport:
    """Write the shards of all runs, then labels and index, and rename the result to the destination.

    The sorted runs are removed last, when everything that takes their place has reached the disk.

    Args:
        listing: what was found in the source.

    Raises:
        DataError: broken images, labels that are not in the class list, a class too small for the validation split, or
            a disk that is too full.
    """
    building, writing = build.folder, build.writing
    paths = [building.runs / name for name in runs]
    images = read_images(paths)
    order, again = shuffled(images)
    names = [one_line(images.name(image)) for image in again]
    left_out = [*images.broken, *(BrokenInput(name, SAME_NAME) for name in names)]
    refuse_broken(left_out, len(images.rank) + len(images.broken), writing.skip_broken)
    accounting = account(listing, images, order, left_out, build.reading.selection.leave_out)
    accounting.check()
    remark_on_conversion(accounting, build.reading.conversion, images.kind[order])
    classes, labels = _labels(images, writing, build.storage)
    remark_on_classes(accounting, classes, images, order, labels[order])
    if writing.classes is None and writing.index is None:
        remark_on_lost_classes(accounting, images)
    splits = _split(images, order, labels[order], classes, writing)
    remark_on_validation(accounting, classes, [split.labels for split in splits])
    as_json = labels.shape[1] > 1

    repeated = repetitions(images.key_hash[order])
    repetition = {int(order[position]): count for position, count in repeated.items()}
    for split in splits:
        (building.shards / split.name).mkdir(exist_ok=True)
    _remove_obsolete(building, {path for split in splits for path in split.paths(building)})
    _refuse_full_disk(building, sum(split.bytes for split in splits))
    tasks = (task for split in splits for task in _tasks(build, paths, images, split, repetition, as_json))
    entries = _write(build, tasks, len(order))

    indexes: dict[Path, ShardIndex] = {}
    unpublished: list[ShardIndex] = []
    for split in splits:
        folder = building.shards / split.name
        most = int((split.labels >= 0).sum(axis=1).max(initial=1))
        content, sha256 = labels_file(np.ascontiguousarray(split.labels[:, :most]))
        write_atomically(folder / LABELS_NAME, content)
        index = ShardIndex(
            folder=str(folder),
            classes=classes,
            image_fields=tuple(sorted({images.extensions[e] for e in np.unique(images.extension[split.images])})),
            label=LabelFormat("json", "labels") if as_json else LabelFormat(),
            shards=tuple(entries[path] for path in split.paths(building)),
            labels_per_sample=most,
            labels_sha256=sha256,
            images_decode=True,  # or a build does not take them
        )
        final = build.destination / split.name
        indexes[final] = replace(index, folder=str(final), home=str(final))
        unpublished.append(index)
    done = report(images, order, left_out, build.reading, indexes, accounting)
    for index in unpublished:
        write_atomically(Path(index.folder) / REPORT_NAME, json.dumps(done.document(), indent=1) + "\n")
        index.write()
    building.plan().record(build.destination).write(building.shards)
    if build.destination.exists():
        build.destination.rmdir()
    building.shards.rename(build.destination)
    sync_folder(build.destination)
    sync_folder(build.destination.absolute().parent)
    building.remove()
    return done


def report(
    images: Images,
    order: Int64,
    left_out: list[BrokenInput],
    reading: ReadOptions,
    indexes: dict[Path, ShardIndex],
    accounting: Accounting,
) -> BuildReport:
    """The report on the images in `order`."""
    kind = images.kind[order]
    again = (kind & Kind.ENCODED_AGAIN) > 0
    kinds = []

    def first(found: NDArray[np.intp]) -> list[str]:
        return [one_line(images.name(int(order[position]))) for position in found[:FIRST_NAMES]]

    for bit, words in DIFFERENCES.items():
        found = np.flatnonzero(kind & bit)
        if found.size:
            kinds.append(KindCount(words, int(found.size), int(again[found].sum()), first(found)))
    shrunk, encoded_again, marked = (
        int(np.count_nonzero(kind & bit)) for bit in (Kind.SHRUNK, Kind.ENCODED_AGAIN, Kind.MARKED)
    )
    without = np.flatnonzero(kind & Kind.UNMARKED)
    unmarked = LeftOut(int(without.size), first(without))
    return BuildReport(
        indexes, len(order), left_out, kinds, shrunk, encoded_again, marked, unmarked, reading.conversion, accounting
    )


def refuse_broken(broken: list[BrokenInput], images: int, skip_broken: bool) -> None:
    """
    Raises:
        DataError: there are broken images, and they must not be skipped.
    """
    if broken and not skip_broken:
        tars = [b for b in broken if b.is_tar]
        shown = tars or broken
        listing = "; ".join(f"{one_line(b.name)} ({b.reason})" for b in shown[:5]) + (" ..." if len(shown) > 5 else "")
        if tars:
            raise DataError(f"{listing}. Copy the tar again, or keep the images that can be read with --skip-broken")
        raise DataError(
            f"{len(broken):,} of {images:,} images cannot be decoded: {listing}. Replace or remove them, or leave them "
            "out with --skip-broken"
        )


def _labels(images: Images, writing: WriteOptions, storage: Storage) -> tuple[tuple[str, ...], Int32]:
    """The class list, and the labels (N, k) of all images as positions in it."""
    if writing.index is not None:
        names = indexed_classes(writing.index, storage)
        if writing.classes is None:
            return names, relabelled(images, tuple(map(str, range(len(names)))), writing.index.location)
        images = replace(images, classes=tuple(names[int(number)] for number in images.classes))
    if writing.classes is not None:
        given = read_classes(writing.classes, storage)
        return given, relabelled(images, given, writing.classes)
    images = replace(images, classes=whole_numbers(images.classes))
    ordered = numbered(tuple(sorted(set(images.classes))))
    return ordered, relabelled(images, ordered, "the images")


def _split(
    images: Images, order: Int64, labels: Int32, classes: tuple[str, ...], writing: WriteOptions
) -> list[_Split]:
    bytes_ = sample_bytes(images, order, labels, as_json=labels.shape[1] > 1)

    def cut(name: str, chosen: NDArray[np.bool_]) -> _Split:
        bounds = cuts(bytes_[chosen], writing.samples_per_shard, writing.shard_bytes)
        return _Split(name, order[chosen], labels[chosen], int(bytes_[chosen].sum()), list(bounds))

    if not writing.validation_per_class and not writing.validation_fraction:
        return [cut("", np.ones(len(order), np.bool_))]
    mask = validation_mask(labels, classes, writing.validation_per_class, writing.validation_fraction)
    if not mask.any():
        raise DataError(
            f"a validation fraction of {writing.validation_fraction} takes no image of any class; use a larger one"
        )
    return [cut("train", ~mask), cut("validation", mask)]


def _tasks(
    build: BuildContext,
    runs: list[Path],
    images: Images,
    split: _Split,
    repetition: dict[int, int],
    as_json: bool,
) -> Iterator[ShardTask]:
    for path, (begin, end) in zip(split.paths(build.folder), split.cuts, strict=True):
        rows = split.images[begin:end]
        yield ShardTask(
            path=path,
            entry=build.folder.entries / f"{path.name}.json",
            runs=runs,
            run=images.run[rows],
            offset=images.offset[rows],
            size=images.size[rows],
            names=[images.encoded_name(image) for image in rows.tolist()],
            repetition=[repetition.get(image, 1) for image in rows.tolist()],
            extensions=[images.extensions[e] for e in images.extension[rows].tolist()],
            labels=split.labels[begin:end],
            as_json=as_json,
            memory=build.reading.memory,
        )


def _write(build: BuildContext, tasks: Iterator[ShardTask], images: int) -> dict[Path, ShardEntry]:
    """The entries of all shards by path; shards that an earlier call finished are not written again."""
    entries: dict[Path, ShardEntry] = {}
    samples = written = 0

    def count(path: Path, entry: ShardEntry, kept: bool = False) -> None:
        nonlocal samples, written
        entries[path] = entry
        samples, written = samples + entry.samples, written + entry.bytes
        build.progress(BuildProgress("writing shards", samples, written, samples / images, kept))

    def unfinished() -> Iterator[ShardTask]:
        for task in tasks:
            entry = finished_shard(task)
            if entry is None:
                yield task
            else:
                count(task.path, entry, kept=True)

    for path, entry in build.workers.results(write_shard, unfinished()):
        count(path, entry)
    return entries


def _remove_obsolete(building: BuildFolder, expected: set[Path]) -> None:
    """Remove the shards of an earlier call with other options."""
    for path in building.shards.rglob("*"):
        if path.is_file() and path not in expected:
            path.unlink()
    for folder in building.shards.iterdir():
        if folder.is_dir() and not any(path.parent == folder for path in expected):
            folder.rmdir()


def _refuse_full_disk(building: BuildFolder, needed: int) -> None:
    written = sum(path.stat().st_size for path in building.shards.rglob("*.tar"))
    free = shutil.disk_usage(building.path).free
    if free < needed - written:
        missing = f"{(needed - written) / 1e6:,.1f} MB more and {free / 1e6:,.1f} MB are free"
        raise DataError(f"{building.path}: the shards need {missing}; free some space")
