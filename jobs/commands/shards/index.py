"""`coatnet shards index`: an index for shards that others have built."""

from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from data.class_mixing import advice_on_index
from data.dataset import Dataset
from data.indexing.index_shards import IndexingReport, index_shards
from data.indexing.inference import GivenFields
from data.indexing.scan import ScanOptions
from data.label_files import read_classes
from data.storage import Storage
from jobs.commands.arguments import Anonymous, Endpoint, GiveUpAfter, Profile, Threads
from jobs.commands.shards.progress import reading_progress
from jobs.console import make_console, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error

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
        str | None, typer.Option(help="Class names in order: a file with one per line, or indexed shards.")
    ] = None,
    skip_broken_shards: Annotated[
        bool, typer.Option("--skip-broken-shards", help="Leave out shards that are not whole tars.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
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
        )
        console, storage = make_console(), Storage(endpoint, profile, anonymous, give_up_after)
        with reading_progress(console) as (begin, advance):
            report = index_shards(
                patterns,
                given=given,
                classes=read_classes(classes, storage) if classes else None,
                output=output,
                overwrite=overwrite,
                skip_broken_shards=skip_broken_shards,
                scanning=ScanOptions(storage, threads, begin, advance),
            )
        for line in (*report_lines(report), *advice_on_index(Dataset(report.index, storage))):
            print_line(console, line)


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


def _extension(name: str) -> str:
    return name.removeprefix(".").lower()
