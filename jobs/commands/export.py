"""`coatnet export`: a trained model as one file."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.checkpoint_discovery import find_checkpoint
from jobs.console import make_console, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error
from pipeline.export import export as export_weights
from pipeline.runs.announcements import list_name


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="The run folder of a stage, or one of its checkpoints.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    weights: Annotated[
        Literal["auto", "raw", "ema"],
        typer.Option(help="The trained weights (raw) or their moving average (ema); auto prefers ema."),
    ] = "auto",
) -> None:
    """Write the weights of a checkpoint to a safetensors file for models.registry.create_model."""
    with exit_on_error(STARTS_OVER):
        facts = export_weights(find_checkpoint(source), destination, weights)
        model = json.loads(facts["model"])
        kind = "moving average" if facts["weights"] == "ema" else "raw weights"
        print_line(
            make_console(),
            f"{destination}: {model['name']}, {model['num_classes']:,} classes "
            f"({list_name(facts['classes'])}), {model['image_size']} pixels; "
            f"{kind} of {facts['source']}",
        )
