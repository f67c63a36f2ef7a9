"""`coatnet shards index`, `verify` and `show`: shards that are there."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from data.errors import EXIT_CONFIG
from data.storage import Storage
from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from data.indexing.index_shards import IndexingReport
    from data.indexing.summary import DrawnSample

AGAIN = "the same command begins anew"
WORTH_A_WARNING = 0.001
"""Share of samples that cannot be used beyond which a run stops unless data.skipped_share says otherwise."""
DRAWN = 256
"""Samples that formats and sizes are taken from, at least."""
_BAR = 30  # characters

Endpoint = Annotated[str | None, typer.Option(help="URL of the S3 server; by default AWS_ENDPOINT_URL or Amazon.")]
Profile = Annotated[str | None, typer.Option(help="Profile in the AWS credentials file.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Ask without credentials.")]
# Less than a run's: someone may be waiting for the answer to a slip in a URL.
GiveUpAfter = Annotated[float, typer.Option(min=0, help="Seconds without an answer after which to stop.")]
Threads = Annotated[int, typer.Option(min=1, help="Shards that are read at a time.")]


def index(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN...",
            help="Folders, globs or brace patterns, local or remote: s3://bucket/x-{0000..0099}.tar",
        ),
    ],
    output: Annotated[str | None, typer.Option(help="Folder for the index; by default that of the shards.")] = None,
    image_field: Annotated[
        list[str] | None, typer.Option(help="Extension of the images; may be given several times.")
    ] = None,
    label_field: Annotated[str | None, typer.Option(help="Extension of the labels: cls, json, txt or another.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Key of the labels in JSON.")] = None,
    label_by: Annotated[
        Literal["number", "name"] | None, typer.Option(help="Labels are a class's number or its name.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes in their order: a file with one a line, or indexed shards.")
    ] = None,
    skip_broken_shards: Annotated[
        bool, typer.Option("--skip-broken-shards", help="Leave out shards that are no whole tars.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    threads: Threads = 8,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Make the index for WebDatasets that others built, and say what is wrong with them."""
    with exit_on_error(AGAIN):
        from data.indexing.index_shards import index_shards
        from data.indexing.inference import GivenFields
        from data.indexing.scan import ScanOptions
        from data.label_files import read_classes

        given = GivenFields(
            image_fields=tuple(map(_extension, image_field)) if image_field else None,
            label_field=_extension(label_field) if label_field else None,
            label_key=label_key,
            label_by=label_by,
        )
        console, storage = _console(), Storage(endpoint, profile, anonymous, give_up_after)
        with _progress(console) as (begin, advance):
            report = index_shards(
                patterns,
                given=given,
                classes=read_classes(classes, storage) if classes else None,
                output=output,
                overwrite=overwrite,
                skip_broken_shards=skip_broken_shards,
                scanning=ScanOptions(storage, threads, begin, advance),
            )
        for line in report_lines(report):
            console.print(line, soft_wrap=True, markup=False)


def report_lines(report: "IndexingReport") -> Iterator[str]:
    """What was indexed, inferred and found wrong."""
    index, problems = report.index, report.problems
    if report.inferred:
        yield f"inferred: {', '.join(report.inferred)}"
    for name, why in report.left_out.items():
        yield f"left out {name}: {why}"
    for problem, count in problems.counts.items():
        yield f"{problem}: {count:,} of {index.samples:,} samples"
        for shard, key, detail in problems.first[problem]:
            yield f"  {shard}: {key}{f': {detail}' if detail else ''}"
        if count > len(problems.first[problem]):
            yield "  ..."
    if problems.samples > WORTH_A_WARNING * index.samples:
        yield (
            f"warning: {problems.samples / index.samples:.2%} of the samples cannot be used; a run stops beyond "
            f"{WORTH_A_WARNING:.1%} unless data.skipped_share is greater"
        )
    if report.repeated_key:
        key, first, second = report.repeated_key
        yield f"{report.repeated_keys:,} keys stand in several shards (the first, {key}, in {first} and {second})"
    if index.label.by == "name" and 2 * len(index.classes) > index.samples:
        yield (
            f"warning: {len(index.classes):,} classes among {index.samples:,} samples; are the {index.label.field} "
            "members labels? See --label-field"
        )
    formats = ", ".join(f"{kind} in {field} {count:,}" for (field, kind), count in report.formats.most_common())
    yield f"images: {formats}"
    yield (
        f"{index.home}: {index.samples:,} samples of {len(index.classes):,} classes in {len(index.shards):,} shards, "
        f"{index.bytes / 1e6:,.1f} MB"
    )


def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or URL with an index.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, and tell what cannot be used.")] = False,
    threads: Threads = 8,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Read shards again and hold them against their index."""
    with exit_on_error(AGAIN):
        from data.index import read_index
        from data.indexing.scan import ScanOptions
        from data.indexing.verify import verify_shards

        storage, console = Storage(endpoint, profile, anonymous, give_up_after), _console()
        index = read_index(url, storage)
        wrong = 0
        with _progress(console) as (begin, advance):
            for difference in verify_shards(
                index, decode_images=decode, scanning=ScanOptions(storage, threads, begin, advance)
            ):
                wrong += 1
                place = ": ".join(filter(None, (difference.shard and f"shard {difference.shard}", difference.key)))
                console.print(" ".join(filter(None, (place, difference.what))), soft_wrap=True, markup=False)
        read = f"{index.samples:,} samples in {len(index.shards):,} shards, {index.bytes / 1e6:,.1f} MB"
        if index.labels_sha256 is None:
            console.print("labels were not compared: the index has no labels.npy")
        if not wrong:
            console.print(f"{url}: {read}: all as in the index{', and every image decodes' if decode else ''}",
                          soft_wrap=True, markup=False)  # fmt: skip
            return
        console.print(f"{url}: {read}: {wrong:,} problems", soft_wrap=True, markup=False)
        sys.exit(EXIT_CONFIG)


def show(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or URL with an index.")],
    output: Annotated[Path, typer.Option(help="PNG for the contact sheet.")] = Path("contact.png"),
    samples: Annotated[int, typer.Option(min=1, help="Pictures on the contact sheet.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    label_map: Annotated[Path | None, typer.Option(help="YAML file that renames, merges or drops classes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object.")] = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Summarize a dataset, and draw samples of it with their labels as a contact sheet."""
    with exit_on_error(AGAIN):
        from data.dataset import open_dataset
        from data.indexing.summary import describe, draw_samples

        if output.suffix.lower() != ".png":
            raise ConfigError(f"--output {output}: the contact sheet is a PNG; give it a name that ends with .png")
        if not output.absolute().parent.is_dir():
            raise ConfigError(f"--output {output}: no folder {output.parent}; make it first")
        dataset = open_dataset(url, Storage(endpoint, profile, anonymous, give_up_after), label_map)
        drawn = list(draw_samples(dataset, max(samples, DRAWN), seed))
        facts = describe(dataset, drawn)
        draw_sheet(drawn, samples, seed).save(output)
        if as_json:
            print(json.dumps(facts | {"contact_sheet": str(output)}, indent=1))
            return
        console = _console()
        console.print(summary_table(facts))
        for line in histogram_lines(facts["histogram"]):
            console.print(line, soft_wrap=True, markup=False)
        console.print(f"{output}: {min(samples, len(drawn))} samples", soft_wrap=True, markup=False)


def draw_sheet(drawn: "list[DrawnSample]", count: int, seed: int) -> "Image.Image":
    """A contact sheet of `count` of the drawn samples."""
    from data.indexing.contact_sheet import CaptionedImage, contact_sheet

    chosen = sorted(random.Random(seed).sample(range(len(drawn)), min(count, len(drawn))))
    return contact_sheet(
        [
            CaptionedImage(one.thumbnail, ", ".join(one.classes) or one.problem, one.key)
            for one in map(drawn.__getitem__, chosen)
        ]
    )


def summary_table(facts: dict[str, Any]) -> Table:
    """The facts of `describe` but for the histogram."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=False, padding=(0, 1))
    shards, drawn, label = facts["shards"], facts["drawn"], facts["label"]
    key = f" under {label['key']}" if label["key"] else ""
    where = f"{label['field']}{key}, by {label['by']}"
    rows = {
        "folder": facts["folder"],
        "classes": f"{facts['classes']:,}",
        "samples": f"{facts['samples']:,}",
        "labels": f"{where}; up to {facts['labels_per_sample']} a sample",
        "bytes": f"{_size(facts['bytes'])}, {_size(facts['bytes_per_sample'])} a sample",
        "shards": f"{shards['number']:,}",
        "samples of a shard": _line(shards["samples"], "{:,}".format),
        "bytes of a shard": _line(shards["bytes"], _size),
        "digest": facts["digest"],
        f"of {drawn['samples']:,} drawn": ", ".join(f"{name} {count:,}" for name, count in drawn["formats"].items()),
        "  width": _line(drawn["width"], str),
        "  height": _line(drawn["height"], str),
        "  that cannot be used": f"{len(drawn['unusable']):,}",
    }
    for name, text in rows.items():
        table.add_row(name, escape(text))
    for broken in drawn["unusable"][:5]:
        table.add_row("", escape(f"{broken['shard']}: {broken['key']}: {broken['problem']}"))
    return table


def histogram_lines(histogram: dict[str, Any], ends: int = 8) -> Iterator[str]:
    """The most and least frequent classes as bars, and classes without a sample."""
    if histogram["classes"] is None:
        yield f"no label histogram: {histogram['problem']}"
        return
    ordered = sorted(histogram["classes"].items(), key=lambda item: -item[1])
    present = [(name, count) for name, count in ordered if count]
    cut = len(present) > 2 * ends
    shown = present[:ends] + present[-ends:] if cut else present
    width = max((min(len(name), 40) for name, _ in shown), default=0)
    for number, (name, count) in enumerate(shown):
        if cut and number == ends:
            yield f"... {len(present) - 2 * ends:,} more"
        yield f"{name[:40]:{width}} {count:>9,} {'█' * max(1, round(_BAR * count / present[0][1]))}"
    absent = [name for name, count in ordered if not count]
    if absent:
        yield f"classes without a sample: {len(absent):,}: {', '.join(absent[:20])}{' ...' if len(absent) > 20 else ''}"
    if histogram["without_label"]:
        yield f"samples without a label: {histogram['without_label']:,}"


def _line(spread: dict[str, int], written: Callable[[int], str]) -> str:
    return ", ".join(f"{name} {written(value)}" for name, value in spread.items())


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 10**6 else f"{count / 1e3:,.1f} kB"


def _extension(name: str) -> str:
    return name.removeprefix(".").lower()


def _console() -> Console:
    # A pipe has no width to keep to.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes with their rate: what begins it with a total, and what moves it on."""
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda total: bar.update(task, total=total), lambda count: bar.advance(task, count)
