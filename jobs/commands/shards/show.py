"""`coatnet shards show`: a summary and a contact sheet of a dataset."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich import box
from rich.table import Table

from data.dataset import open_dataset
from data.files.atomic_file import atomic_file
from data.images.contact_sheet import CaptionedImage, contact_sheet
from data.indexing.summary import DrawnSample, describe, draw_samples
from data.remote.storage import Storage
from jobs.commands.arguments import Anonymous, AsJson, Endpoint, GiveUpAfter, Profile, ShardsElsewhere, ShardsUrl
from jobs.console import make_console, print_json, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error
from pipeline.errors import ConfigError

_DRAWN = 256
"""Least number of samples to draw, from which formats and sizes are counted."""
_BAR = 30  # characters


def show(
    url: ShardsUrl,
    output: Annotated[Path, typer.Option(help="PNG file for the contact sheet.")] = Path("contact.png"),
    samples: Annotated[int, typer.Option(min=1, help="Images on the contact sheet.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed for drawing the samples.")] = 0,
    label_map: Annotated[Path | None, typer.Option(help="YAML file that renames, merges or drops classes.")] = None,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    elsewhere: ShardsElsewhere = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Summarize a dataset, and draw samples with their labels as a contact sheet."""
    with exit_on_error(STARTS_OVER):
        if output.suffix.lower() != ".png":
            raise ConfigError(f"--output {output}: the contact sheet is a PNG; give it a name that ends in .png")
        if not output.absolute().parent.is_dir():
            raise ConfigError(f"--output {output}: no folder {output.parent}; create it first")
        dataset = open_dataset(
            url, Storage(endpoint, profile, anonymous, give_up_after, shards_elsewhere=elsewhere), label_map
        )
        drawn = list(draw_samples(dataset, max(samples, _DRAWN), seed))
        facts = describe(dataset, drawn)
        with atomic_file(output) as file:
            draw_sheet(drawn, samples, seed).save(file, "PNG")
        if as_json:
            print_json(facts | {"contact_sheet": str(output)})
            return
        console = make_console()
        console.print(summary_table(facts))
        for line in histogram_lines(facts["histogram"]):
            print_line(console, line)
        print_line(console, f"{output}: {min(samples, len(drawn))} samples")


def draw_sheet(drawn: Sequence[DrawnSample], count: int, seed: int) -> Image.Image:
    """A contact sheet of `count` of the drawn samples."""
    chosen = sorted(random.Random(seed).sample(range(len(drawn)), min(count, len(drawn))))
    return contact_sheet(
        [
            CaptionedImage(one.thumbnail, ", ".join(one.classes) or one.problem, one.key)
            for one in map(drawn.__getitem__, chosen)
        ]
    )


def summary_table(facts: dict[str, Any]) -> Table:
    """The facts of `describe` except the histogram."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=False, padding=(0, 1))
    shards, drawn, label = facts["shards"], facts["drawn"], facts["label"]
    key = f" under {label['key']}" if label["key"] else ""
    where = f"{label['field']}{key}, by {label['by']}"
    left_out = f", and {facts['left_out']:,} without a class to train on" if facts["left_out"] else ""
    rows = {
        "folder": facts["folder"],
        "classes": f"{facts['classes']:,}",
        "samples": f"{facts['samples']:,}{left_out}",
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
        table.add_row(name, text)
    for broken in drawn["unusable"][:5]:
        table.add_row("", f"{broken['shard']}: {broken['key']}: {broken['problem']}")
    return table


def histogram_lines(histogram: dict[str, Any], ends: int = 8) -> Iterator[str]:
    """The most and the least frequent classes as bars, and classes without samples."""
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
