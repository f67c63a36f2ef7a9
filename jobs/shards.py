"""`coatnet shards`: datasets as WebDataset shards."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from jobs.outcome import reported

shards = typer.Typer(no_args_is_help=True, help="Build datasets as WebDataset shards.")


@shards.command()
def build(
    source: Annotated[Path, typer.Argument(help="Folder of one folder per class, or a tar of one tar per class.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    seed: Annotated[int, typer.Option(help="Of the global shuffle and the validation split.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images of one tar.")] = 4096,
    validation_per_class: Annotated[
        int, typer.Option(min=0, help="Images of each class for DESTINATION/validation; the rest goes to .../train.")
    ] = 0,
    skip_broken: Annotated[bool, typer.Option(help="Leave out images that do not decode.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and check images.")] = 2,
) -> None:
    """Write images as shuffled, checked shards with an index."""
    with reported():
        build_and_report(
            Console(highlight=False),
            source,
            destination,
            seed=seed,
            samples_per_shard=samples_per_shard,
            validation_per_class=validation_per_class,
            skip_broken=skip_broken,
            threads=threads,
        )


def build_and_report(console: Console, source: Path, destination: Path, **options: Any) -> None:
    """Build shards with the `options` of `build_shards` and a progress bar, then say what was written."""
    from data.build import build_shards

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking and writing images")
        report = build_shards(
            source,
            destination,
            **options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for broken in report.left_out:
        console.print(f"left out {broken.name}: {broken.reason}", soft_wrap=True, markup=False)
    for folder, index in report.indexes.items():
        megabytes = sum(shard.bytes for shard in index.shards) / 1e6
        console.print(
            f"{folder}: {index.samples:,} images of {len(index.classes):,} classes in {len(index.shards):,} shards, "
            f"{megabytes:,.1f} MB",
            soft_wrap=True,
            markup=False,
        )
