"""`coatnet export`: a trained model as one file."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.exit_codes import exit_on_error


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="The run folder of a stage, or one of its checkpoints.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    weights: Annotated[
        Literal["auto", "raw", "ema"],
        typer.Option(help="The raw weights, or their moving average; auto takes that where there is one."),
    ] = "auto",
) -> None:
    """Write the weights of a checkpoint to a safetensors file that models.registry.create_model can be filled from."""
    with exit_on_error("the same command begins anew"):
        from pipeline.export import export as export_weights

        facts = export_weights(source, destination, weights)
        model = json.loads(facts["model"])
        kind = "moving average" if facts["weights"] == "ema" else "raw weights"
        print(
            f"{destination}: {model['name']}, {model['num_classes']:,} classes, {model['image_size']} pixels; "
            f"{kind} of {facts['source']}"
        )
