"""Building shards with a progress bar and a report of what became of the source and what was written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data.accounting import lines, listed
from data.text.counted import counted
from data.text.printable import one_line
from jobs.console import print_json, print_line
from pipeline.errors import BEGUN_FILE

if TYPE_CHECKING:
    from data.building.merge import BuildProgress, BuildReport, KindCount

_MOST_LEFT_OUT = 50  # named one by one


def build_and_report(
    console: Console, source: str | Path, destination: Path, *, as_json: bool = False, **options: Any
) -> None:
    """Build shards with the `options` of `build_shards`, then print what became of the source and what was written.

    A progress bar is shown meanwhile. With `as_json`, only the report is printed, as JSON.
    """
    from data.building.build import build_shards  # with webdataset comes torch: `coatnet run` has shards most times

    with BuildProgressBar(console, hidden=as_json) as bar:
        report = build_shards(source, destination, **options, progress=bar.update)
    print_report(console, report, as_json)
    if not report.indexes and not as_json:
        number, parts = options["part"]
        print_line(
            console,
            f"part {number} of {parts}: {counted(report.images, 'image')} checked; when all parts are, run: "
            f"coatnet shards merge {destination}",
        )


class BuildProgressBar:
    """Phase, images per second, bytes and time left; shows nothing if the output is not a terminal."""

    def __init__(self, console: Console, hidden: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[images]:,} images, {task.fields[gigabytes]:,.2f} GB, {task.fields[rate]:,.0f}/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=hidden or not console.is_terminal,
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
        if not progress.kept and (begun_file := os.environ.get(BEGUN_FILE)):
            Path(begun_file).touch()
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


def print_report(console: Console, report: "BuildReport", as_json: bool = False) -> None:
    """Print what became of the source, what is not an RGB JPEG, and what was written."""
    if as_json:
        print_json(report.document())
        return
    for broken in report.left_out[:_MOST_LEFT_OUT]:
        print_line(console, one_line(f"left out {broken.name}: {broken.reason}"))
    if len(report.left_out) > _MOST_LEFT_OUT:
        print_line(console, f"left out {len(report.left_out) - _MOST_LEFT_OUT:,} more that are broken")
    for kind in report.kinds:
        print_line(console, _described(kind))
    if report.shrunk:
        print_line(
            console,
            f"{counted(report.shrunk, 'image')} shrunk to a short side of {report.conversion.short_side} pixels",
        )
    if report.encoded_again:
        print_line(console, _encoded(report))
    if report.conversion.restart_markers:
        print_line(console, _marked(report))
    for line in lines(report.accounting):
        print_line(console, line)
    for folder, index in report.indexes.items():
        print_line(
            console,
            f"{folder}: {counted(index.samples, 'image')} of {counted(len(index.classes), 'class', 'classes')} in "
            f"{counted(len(index.shards), 'shard')}, {index.bytes / 1e6:,.1f} MB",
        )


def _encoded(report: "BuildReport") -> str:
    conversion = report.conversion
    line = (
        f"{report.encoded_again:,} of {counted(report.images, 'image')} encoded again, as JPEGs of quality "
        f"{conversion.quality} and {conversion.subsampling}"
    )
    if report.encoded_again == report.images:
        return line
    if conversion.recompress:
        return f"{line}; the others would not become smaller and keep their bytes"
    return f"{line}; the others need no change and keep their bytes (--recompress encodes them as well)"


def _marked(report: "BuildReport") -> str:
    line = f"{report.marked:,} of {counted(report.images, 'image')} given restart markers, without a loss"
    unmarked = report.unmarked
    if there := report.images - report.marked - unmarked.count:
        line += f"; {there:,} had them already"
    if unmarked.count:
        line += (
            f"; {unmarked.count:,} cannot have them, being no JPEGs, of a kind whose crops are not decoded alone, or "
            f"ones that libturbojpeg warns of ({listed(unmarked.first, count=unmarked.count)})"
        )
    return line


def _described(kind: "KindCount") -> str:
    unchanged = kind.images - kind.encoded_again
    outcomes = [f"{kind.encoded_again:,} converted to upright RGB JPEGs"] if kind.encoded_again else []
    outcomes += [f"{unchanged:,} stored unchanged (--convert converts them)"] if unchanged else []
    more = ", ..." if kind.images > len(kind.first) else ""
    are = "is" if kind.images == 1 else "are"
    return f"{counted(kind.images, 'image')} {are} {kind.kind} ({', '.join(kind.first)}{more}): {'; '.join(outcomes)}"
