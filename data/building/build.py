"""Images to WebDataset shards: checked, globally shuffled, resumable, published by a single rename.

First each batch of the source becomes a sorted run (`sorted_runs.py`), then shards are merged from the runs
(`merge.py`). Several processes do both. Neither the shuffle nor the bytes of a shard depend on the number of processes
or parts, or on whether the build was killed and resumed: the position of an image follows from the seed and its name.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data.accounting import LeftOut
from data.building.build_folder import BuildFolder, BuildPart, BuildPlan, ReadOptions, WriteOptions
from data.building.build_record import source_state
from data.building.class_folders import Selection
from data.building.conversion import Conversion
from data.building.jpeg_encoding import QUALITY, SUBSAMPLING, Subsampling, refuse_without_effect
from data.building.layouts import open_source
from data.building.merge import BuildContext, BuildProgress, BuildReport, merge_runs, refuse_broken, report
from data.building.report import in_part, read_listing, save_listing
from data.building.restart_markers import require_libturbojpeg
from data.building.shard_plan import read_images, shuffled
from data.building.sorted_runs import RunTable, RunTask, make_run, read_table, table_file
from data.building.source import Source, batches
from data.building.workers import Workers
from data.classes.class_lists import read_classes
from data.classes.label_files import read_label_file
from data.errors import DataError
from data.remote.storage import Storage, is_remote
from data.remote.web_address import without_signature

MEMORY = 512 * 2**20
"""Bytes of images that a process sorts at a time. More means fewer and larger reads when shards are merged."""

Progress = Callable[[BuildProgress], None]


def build_shards(
    source: str | Path,
    destination: Path,
    *,
    seed: int = 0,
    samples_per_shard: int | None = 4096,
    shard_bytes: int | None = None,
    validation_per_class: int = 0,
    validation_fraction: float = 0.0,
    labels: str | Path | None = None,
    classes: str | Path | None = None,
    within: str | None = None,
    nested: bool = False,
    leave_out: Sequence[str] = (),
    convert: bool = False,
    short_side: int | None = None,
    quality: int = QUALITY,
    subsampling: Subsampling = SUBSAMPLING,
    recompress: bool = False,
    restart_markers: bool = False,
    skip_broken: bool = False,
    part: tuple[int, int] | None = None,
    processes: int = 1,
    memory: int = MEMORY,
    storage: Storage = Storage(),  # noqa: B008 (immutable)
    progress: Progress = lambda progress: None,
) -> BuildReport:
    """Write the images of `source` as shards, `labels.npy` and `index.json` into `destination`.

    The same source, seed and options give the same bytes. Nothing appears under `destination` before everything is
    done; until then the work is kept in `.NAME.building` beside it, where the next call continues. It takes as much
    space as the shards.

    Args:
        source: path or URL; see `data.building.layouts.open_source`.
        destination: a folder that does not exist or is empty.
        seed: of the shuffle, and so of the validation split.
        samples_per_shard: maximum number of samples in a shard.
        shard_bytes: maximum size of a shard, unless a single sample is larger.
        validation_per_class, validation_fraction: with one of them the shards go to `destination/train` and
            `destination/validation`, the latter with this number, or this fraction, of the images of each class.
        labels: file with the labels of images that are not in class folders; see `read_label_file`.
        classes: location of a class list, if it is not that of the images; see `read_classes`.
        within, nested, leave_out: see `Selection`.
        convert, short_side, quality, subsampling, recompress, restart_markers: see `Conversion`.
        skip_broken: leave out images that do not decode, and the lost parts of damaged tars.
        part: (number, parts), number from 1: only read this part of the source; `merge_parts` does the rest.
        processes: number of processes that read, check and write; 1 is the calling process.
        memory: bytes of images that each process sorts at a time.
        storage: how a remote source is reached.
        progress: called from time to time.

    Raises:
        DataError: a source, label file or class list that cannot be used, a destination that exists, images that do not
            decode (unless `skip_broken`), a conversion that does not exist, whose quality has no effect or for which
            there is no libturbojpeg, a class too small for the validation split, a full disk, or an unfinished build
            with other options.
        StorageRefused, StorageDown: a remote source refuses access or does not answer.
    """
    destination = _local(destination)
    if validation_per_class and validation_fraction:
        raise DataError("a validation set by count and by fraction; give only one of them")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"a validation fraction of {validation_fraction}: it must be at least 0 and below 1")
    build_part = BuildPart(*part) if part else None
    if build_part and not 1 <= build_part.number <= build_part.parts:
        raise DataError(f"part {build_part}: parts are numbered from 1, as in 1/8 .. 8/8")
    selection = Selection(within, nested, tuple(leave_out))
    try:
        conversion = Conversion(convert, short_side, quality, subsampling, recompress, restart_markers)
        refuse_without_effect(quality, subsampling, conversion.encodes)
    except ValueError as error:
        raise DataError(str(error)) from None
    if restart_markers:
        require_libturbojpeg()
    reading = ReadOptions(seed, conversion, selection, memory)
    writing = WriteOptions(
        samples_per_shard,
        shard_bytes,
        validation_per_class,
        validation_fraction,
        _absolute(classes) if classes is not None else None,
        skip_broken,
        labels=_absolute(labels) if labels is not None else None,
    )
    building = BuildFolder(destination)
    _refuse_existing(destination, building)
    _refuse_inside(destination, source)
    if classes is not None:
        read_classes(str(_absolute(classes)), storage)
    label_file = read_label_file(str(labels), storage) if labels is not None else None
    images = open_source(str(source), storage, label_file, selection)
    writing = replace(writing, index=images.index)
    if build_part and not images.divisible:
        raise DataError(f"{source}: can only be read sequentially and not in parts; build it without --part")
    location = _absolute(source)
    building.begin(
        BuildPlan(without_signature(location), images.bytes, reading, writing, source_state(location)), build_part
    )
    if build_part:
        with building.reading(build_part), Workers(processes) as workers:
            build = BuildContext(building, destination, reading, writing, storage, workers, progress)
            runs, elsewhere = _make_runs(build, images, build_part)
            save_listing(building.path, build_part, images.accounting)
            building.finish_part(build_part, runs)
        if not runs:  # more parts than batches
            accounting = in_part(images.accounting, None, elsewhere)
            return BuildReport({}, 0, [], [], 0, 0, 0, LeftOut(), conversion, accounting)
        read = read_images([building.runs / name for name in runs])
        accounting = in_part(images.accounting, read, elsewhere)
        return report(read, shuffled(read)[0], read.broken, reading, {}, accounting)
    with building.lock(), _kept_unless_small(building), Workers(processes) as workers:
        build = BuildContext(building, destination, reading, writing, storage, workers, progress)
        runs, _ = _make_runs(build, images, BuildPart(1, 1))
        building.finish_part(BuildPart(1, 1), runs)
        save_listing(building.path, BuildPart(1, 1), images.accounting)
        return merge_runs(build, runs, images.accounting)


def merge_parts(
    destination: Path,
    *,
    processes: int = 1,
    storage: Storage = Storage(),  # noqa: B008 (immutable)
    progress: Progress = lambda progress: None,
) -> BuildReport:
    """Write the shards of a build once all its parts are read, with the options of the parts.

    Raises:
        DataError: there is no such build, parts are missing or still being read, or as for `build_shards`.
    """
    destination = _local(destination)
    building = BuildFolder(destination)
    _refuse_existing(destination, building)
    try:
        plan = building.plan()
    except FileNotFoundError:
        raise DataError(
            f"{destination}: no build to merge; begin one with: coatnet shards build SOURCE {destination} --part 1/N"
        ) from None
    runs = building.all_runs()
    with building.lock(), Workers(processes) as workers:
        build = BuildContext(building, destination, plan.reading, plan.writing, storage, workers, progress)
        return merge_runs(build, runs, read_listing(building.path))


def _make_runs(build: BuildContext, source: Source, part: BuildPart) -> tuple[list[str], int]:
    """Make the runs of a part; returns their names and the number of entries in other parts.

    Runs of an earlier call are kept unless images were broken.
    """
    reading = build.reading
    _refuse_full_disk(source, build.folder, reading)
    names: list[str] = []
    shares: dict[str, float] = {}
    images = bytes_ = 0
    share = 0.0
    broken = []
    elsewhere = 0

    def count(name: str, table: RunTable, kept: bool = False) -> None:
        nonlocal images, bytes_, share
        images, bytes_, share = images + table.images, bytes_ + table.bytes, share + shares[name]
        broken.extend(table.broken)
        build.progress(BuildProgress("reading images", images, bytes_, min(1.0, share * part.parts), kept))

    def tasks() -> Iterator[RunTask]:
        nonlocal elsewhere
        # The batches of a sequential source hold its images, and several batches are in flight.
        most = reading.memory if source.divisible else reading.memory // 4
        for number, batch in enumerate(batches(source.items(), most)):
            if number % part.parts != part.number - 1:
                elsewhere += len(batch.contents)
                continue
            name = f"run-{number:06d}-{batch.digest()}"
            path = build.folder.runs / name
            names.append(name)
            shares[name] = batch.share
            if table_file(path).exists() and not (table := read_table(path)).broken:
                count(name, table, kept=True)
            else:
                yield RunTask(
                    path, batch, reading.seed, reading.conversion, reading.memory, build.storage, reading.selection
                )

    for name, table in build.workers.results(make_run, tasks()):
        count(name, table)
    refuse_broken(broken, images + len(broken), build.writing.skip_broken)
    if not images and part.parts == 1:
        raise DataError(f"{source.location}: no image in it can be decoded; check that it contains images")
    return sorted(names), elsewhere


@contextmanager
def _kept_unless_small(building: BuildFolder) -> Iterator[None]:
    """After an error, keep what was read for the next call unless it is next to nothing."""
    try:
        yield
    except DataError as error:
        if building.is_small():
            building.remove()
            raise
        kept = f"what was read so far is kept in {building.path}, where the next call continues"
        raise type(error)(f"{error} ({kept})") from error


def _local(destination: Path) -> Path:
    """The folder that is written; a link stands for what it points to, since a rename would replace the link.

    Raises:
        DataError: it is a URL.
    """
    # A Path has one slash where a URL has two or three.
    if match := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", str(destination)):
        raise DataError(
            f"{destination}: shards are built in a local folder, and this is a URL; "
            + ("give its path" if match[1] == "file" else "build them locally and copy them there")
        )
    return destination.resolve() if destination.is_symlink() else destination


def _refuse_inside(destination: Path, source: str | Path) -> None:
    """
    Raises:
        DataError: the destination is in the source, of which it would become a part.
    """
    if is_remote(str(source)):
        return
    folder = Path(_absolute(source))
    if folder.is_dir() and destination.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{destination}: is inside of the source {source}; choose a destination outside of it")


def _refuse_existing(destination: Path, building: BuildFolder) -> None:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if building.path.exists() and not building.shards.exists():
        building.remove()  # killed between the last rename and the clean-up
    raise DataError(f"{destination}: already exists; choose another destination or remove it")


def _refuse_full_disk(source: Source, building: BuildFolder, reading: ReadOptions) -> None:
    if source.bytes is None or reading.conversion.encodes:
        return
    present = sum(path.stat().st_size for path in building.path.rglob("*") if path.is_file())
    needed = 2 * source.bytes - present
    free = shutil.disk_usage(building.path).free
    if free < needed:
        raise DataError(
            f"{building.path}: building needs about {needed / 1e9:,.1f} GB, twice the images, and {free / 1e9:,.1f} GB "
            "are free; free some space, or shrink the images with --short-side"
        )


def _absolute(location: str | Path) -> str:
    return str(location) if is_remote(location) else os.path.abspath(str(location).removeprefix("file://"))
