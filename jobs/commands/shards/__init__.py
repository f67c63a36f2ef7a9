"""`coatnet shards`: datasets as WebDataset shards. One file per command."""

import typer

from jobs.lazy_commands import LazyCommand, lazy_group

COMMANDS = {
    "build": "Write images as shuffled, checked shards with an index; run again, continue where it stopped.",
    "merge": "Write the shards of a build whose parts (`shards build --part`) have all been read.",
    "index": "Index WebDatasets that others have built, and list their problems.",
    "verify": "Read shards again and compare them with their index.",
    "show": "Summarize a dataset, and draw samples with their labels as a contact sheet.",
}

shards = typer.Typer(
    cls=lazy_group({name: LazyCommand(f"{__name__}.{name}", help, name) for name, help in COMMANDS.items()}),
    no_args_is_help=True,
    add_completion=False,
)


@shards.callback()
def _shards() -> None:
    """Build, index, verify and show WebDataset shards."""
