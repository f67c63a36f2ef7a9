"""`coatnet shards index`: an index for shards that others have built."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import typer

from data.accounting import lines
from data.classes.class_lists import read_class_list
from data.classes.class_mixing import advice_on_index
from data.dataset import open_dataset
from data.index import is_elsewhere
from data.indexing.index_shards import IndexingReport, index_shards
from data.indexing.inference import GivenFields
from data.indexing.scan import ScanOptions
from data.remote.storage import Storage
from jobs.commands.arguments import Anonymous, AsJson, Endpoint, GiveUpAfter, Profile, Threads
from jobs.commands.shards.progress import reading_progress
from jobs.console import make_console, print_json, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error
from pipeline.monitoring.console import PrintableConsole

_WARNING_SHARE = 0.001
"""Share of unusable samples above which a run stops, unless data.skipped_share says otherwise."""


def index(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN...",
            help="Folders, globs or brace patterns, local or remote: s3://bucket/x-{0000..0099}.tar",
        ),
    ],
    output: Annotated[str | None, typer.Option(help="Folder for the index.", show_default="that of the shards")] = None,
    image_field: Annotated[
        list[str] | None, typer.Option(help="Extension of the images; may be given several times.")
    ] = None,
    label_field: Annotated[str | None, typer.Option(help="Extension of the labels: cls, json, txt or another.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Key of the labels in JSON.")] = None,
    label_by: Annotated[
        Literal["number", "name"] | None, typer.Option(help="Whether labels are class numbers or class names.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names in order: a file with one per line, JSON, or indexed shards.")
    ] = None,
    label_lists: Annotated[
        Literal["classes", "multi-hot"] | None,
        typer.Option(help="What lists of numbers are: the classes of the sample, or a 0 or 1 for each class."),
    ] = None,
    first_label: Annotated[
        int | None, typer.Option(min=0, help="The label of the first class, if labels are numbers.", show_default="0")
    ] = None,
    ignore_label: Annotated[
        list[str] | None,
        typer.Option(help="Leave samples with this label out of the epochs, such as -1; may be given several times."),
    ] = None,
    mix_splits: Annotated[
        bool, typer.Option("--mix-splits", help="Index training and validation shards as one dataset.")
    ] = False,
    skip_broken_shards: Annotated[
        bool, typer.Option("--skip-broken-shards", help="Leave out shards that are not whole tars.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode every image, so that training may decode crops alone.")
    ] = False,
    as_json: AsJson = False,
    threads: Threads = 8,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Index WebDatasets that others have built, and list their problems."""
    with exit_on_error(STARTS_OVER):
        given = GivenFields(
            image_fields=tuple(map(_extension, image_field)) if image_field else None,
            label_field=_extension(label_field) if label_field else None,
            label_key=label_key,
            label_by=label_by,
            label_lists=label_lists,
            first_label=first_label,
            ignored_labels=tuple(ignore_label or ()),
        )
        console = PrintableConsole(stderr=True) if as_json else make_console()
        storage = Storage(endpoint, profile, anonymous, give_up_after)
        with reading_progress(console) as (begin, advance):
            report = index_shards(
                patterns,
                given=given,
                classes=read_class_list(classes, storage) if classes else None,
                output=output,
                overwrite=overwrite,
                skip_broken_shards=skip_broken_shards,
                mix_splits=mix_splits,
                decode_images=decode,
                scanning=ScanOptions(storage, threads, begin, advance),
            )
        if as_json:
            print_json(report.document())
            return
        own = replace(storage, shards_elsewhere=True)
        for line in (*report_lines(report), *advice_on_index(open_dataset(report.index.home, own))):
            print_line(console, line)
        if is_elsewhere(report.index):
            print_line(
                console,
                "the shards are outside of the folder of this index: who reads them sets data.storage.shards_elsewhere",
            )


def report_lines(report: IndexingReport) -> Iterator[str]:
    """What was indexed, what was inferred, and which problems there are."""
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
    if problems.samples > _WARNING_SHARE * index.samples:
        yield (
            f"warning: {problems.samples / index.samples:.2%} of the samples cannot be used; a run stops above "
            f"{_WARNING_SHARE:.1%} unless data.skipped_share allows more"
        )
    if report.repeated_key:
        key, first, second = report.repeated_key
        yield f"{report.repeated_keys:,} keys are in several shards (the first, {key}, in {first} and {second})"
    formats = ", ".join(f"{kind} in {field} {count:,}" for (field, kind), count in report.formats.most_common())
    yield f"images: {formats}"
    yield from lines(report.files)
    yield from lines(report.members)
    yield (
        f"{index.home}: {index.samples:,} samples of {len(index.classes):,} classes in {len(index.shards):,} shards, "
        f"{index.bytes / 1e6:,.1f} MB"
    )


def _extension(name: str) -> str:
    return name.removeprefix(".").lower()
