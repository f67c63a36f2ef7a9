"""`coatnet shards merge`: shards from the parts that an array of jobs has read."""

from pathlib import Path
from typing import Annotated

import typer

from data.building.build import merge_parts
from jobs.commands.arguments import AsJson, Processes
from jobs.commands.shards.build import processors
from jobs.console import make_console
from jobs.exit_codes import exit_on_error
from jobs.shard_building import BuildProgressBar, print_report


def merge(
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="The DESTINATION of the parts.")],
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Write the shards of a build whose parts (`shards build --part`) have all been read."""
    with exit_on_error("the same command continues"):
        console = make_console()
        with BuildProgressBar(console, hidden=as_json) as bar:
            report = merge_parts(destination, processes=processes or processors(), progress=bar.update)
        print_report(console, report, as_json)
