"""`coatnet export`: a trained model for use elsewhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from data.text.printable import one_line
from jobs.checkpoint_discovery import model_location
from jobs.commands.arguments import ModelLocation, Weights
from jobs.console import make_console, print_line, print_warning
from jobs.exit_codes import STARTS_OVER, exit_on_error
from pipeline.exports.export import ExportReport
from pipeline.exports.export import export as export_model
from pipeline.runs.announcements import list_name


def export(
    source: ModelLocation,
    destination: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A folder, or a file: model.safetensors, model.onnx or model.pt2."),
    ],
    wanted: Annotated[
        Literal["safetensors", "timm", "onnx", "torch"] | None,
        typer.Option(
            "--format",
            help="By default that of OUT's suffix. timm is a folder that timm loads; torch is torch.export's.",
        ),
    ] = None,
    weights: Weights = "auto",
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Names of the classes for people: lines as `n01440764 tench, Tinca tinca`."),
    ] = None,
) -> None:
    """Write a trained model for use elsewhere: safetensors with a config, timm's form, ONNX or torch.export."""
    with exit_on_error(STARTS_OVER):
        report = export_model(model_location(source), destination, weights, wanted, names)
        console = make_console()
        for remark in report.remarks:
            print_warning(console, one_line(remark))
        print_line(console, _summary(report))


def _summary(report: ExportReport) -> str:
    facts = report.facts
    kind = "moving average" if facts.weights == "ema" else "raw weights"
    listed = f" ({list_name(facts.classes_digest)})" if facts.classes_digest else ""
    named = "" if facts.display_names is None else " with names for people"
    checked = ""
    if report.difference is not None:
        within = f" within {report.difference:.0e}" if report.difference else " to the bit"
        checked = f"; {report.compared_by} gives the model's logits{within}"
    elif report.compared_by is not None:
        checked = f"; not checked, since {report.compared_by} is not installed"
    return (
        f"{report.destination}: {report.format}, {report.bytes / 1e6:,.1f} MB; {facts.arguments['name']}, "
        f"{facts.arguments['num_classes']:,} classes{listed}{named}, {facts.preprocessing.image_size} pixels; "
        f"{kind} of {facts.source.resolved}{checked}"
    )
