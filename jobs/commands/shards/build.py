"""`coatnet shards build`: images as WebDataset shards."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jobs.commands.arguments import Processes
from jobs.console import make_console, print_line
from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from data.building.merge import BuildProgress, BuildReport, KindCount

_MOST_LEFT_OUT = 50
"""Number of images left out that are named."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Path or URL: a folder with a folder for each class, a tar with a tar for each class, a flat folder "
            "or tar with --labels, or a list (.txt, .tsv, .csv) with lines of PATH<TAB>LABEL [LABEL ...].",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="Folder to write; must be missing or empty.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the global shuffle and the validation split.")] = 0,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Most images of one tar.", show_default="4096 without --shard-bytes")
    ] = None,
    shard_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes of one tar, as in 400MB.")] = None,
    validation_per_class: Annotated[
        int, typer.Option(min=0, help="Images of each class for DESTINATION/validation; the rest goes to .../train.")
    ] = 0,
    validation_fraction: Annotated[
        float, typer.Option(min=0, help="Fraction of each class for DESTINATION/validation, instead of a number.")
    ] = 0.0,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Labels of a flat source: lines of NAME LABEL, or of LABEL in the order of the names."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Class list to use: a file with one name per line, or a folder with an index, so that a validation "
            "set gets the class numbers of the training set.",
        ),
    ] = None,
    within: Annotated[str | None, typer.Option(metavar="FOLDER", help="Read only this folder of a tar.")] = None,
    convert: Annotated[bool, typer.Option(help="Convert everything else to upright RGB JPEGs.")] = False,
    short_side: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Shrink larger images to this short side.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of JPEGs that are encoded again.")] = 95,
    skip_broken: Annotated[bool, typer.Option(help="Leave out images that do not decode.")] = False,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Read only part I of N, from 1, in a job array; then run `shards merge`."),
    ] = None,
    processes: Processes = None,
) -> None:
    """Write images as shuffled, checked shards with an index; run again, continue where it stopped."""
    with exit_on_error():
        build_and_report(
            make_console(),
            source,
            destination,
            seed=seed,
            samples_per_shard=samples_per_shard or (None if shard_bytes else 4096),
            shard_bytes=_bytes(shard_bytes) if shard_bytes is not None else None,
            validation_per_class=validation_per_class,
            validation_fraction=validation_fraction,
            labels=labels,
            classes=classes,
            within=within,
            convert=convert,
            short_side=short_side,
            quality=quality,
            skip_broken=skip_broken,
            part=_part(part) if part is not None else None,
            processes=processes or processors(),
        )


def build_and_report(console: Console, source: str | Path, destination: Path, **options: Any) -> None:
    """Build shards with the `options` of `build_shards` and a progress bar, then print what was written."""
    from data.building.build import build_shards  # with webdataset comes torch: `coatnet run` has shards most times

    with BuildProgressBar(console) as bar:
        report = build_shards(source, destination, **options, progress=bar.update)
    print_report(console, report)
    if not report.indexes:
        number, parts = options["part"]
        print_line(
            console,
            f"part {number} of {parts}: {report.images:,} images checked; when all parts are, run: "
            f"coatnet shards merge {destination}",
        )


class BuildProgressBar:
    """Phase, images per second, bytes and time left; shows nothing if the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[images]:,} images, {task.fields[gigabytes]:,.2f} GB, {task.fields[rate]:,.0f}/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._phase = ""
        self._images_before = 0
        self._task = self._progress.add_task("listing images", total=1.0, images=0, gigabytes=0.0, rate=0.0)

    def __enter__(self) -> "BuildProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, progress: "BuildProgress") -> None:
        if progress.phase != self._phase:
            self._phase, self._images_before = progress.phase, progress.images
            self._progress.reset(self._task, total=1.0, description=progress.phase)
        elapsed = self._progress.tasks[0].elapsed
        self._progress.update(
            self._task,
            completed=progress.share,
            images=progress.images,
            gigabytes=progress.bytes / 1e9,
            rate=(progress.images - self._images_before) / elapsed if elapsed else 0.0,
        )


def print_report(console: Console, report: "BuildReport") -> None:
    """Print what was left out, what is not an RGB JPEG, and what was written."""
    for broken in report.left_out[:_MOST_LEFT_OUT]:
        print_line(console, f"left out {broken.name}: {broken.reason}")
    if len(report.left_out) > _MOST_LEFT_OUT:
        print_line(console, f"left out {len(report.left_out) - _MOST_LEFT_OUT:,} more")
    for kind in report.kinds:
        print_line(console, _described(kind))
    if report.shrunk:
        print_line(console, f"{report.shrunk:,} images shrunk to a short side of {report.short_side} pixels")
    for folder, index in report.indexes.items():
        print_line(
            console,
            f"{folder}: {index.samples:,} images of {len(index.classes):,} classes in {len(index.shards):,} shards, "
            f"{index.bytes / 1e6:,.1f} MB",
        )


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _described(kind: "KindCount") -> str:
    unchanged = kind.images - kind.encoded_again
    outcomes = [f"{kind.encoded_again:,} converted to upright RGB JPEGs"] if kind.encoded_again else []
    outcomes += [f"{unchanged:,} stored unchanged (--convert converts them)"] if unchanged else []
    more = ", ..." if kind.images > len(kind.first) else ""
    return f"{kind.images:,} images are {kind.kind} ({', '.join(kind.first)}{more}): {'; '.join(outcomes)}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", text.strip().upper())
    unit = match[2] if match else ""
    try:
        size = int(float(match[1]) * _UNITS[unit if unit in _UNITS else f"{unit}B"]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise ConfigError(f"--shard-bytes {text}: not a size; write it as in 400MB or 1.5GB")
    return size


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ConfigError(f"--part {text}: not a part; write it as in 3/8")
    return int(match[1]), int(match[2])
