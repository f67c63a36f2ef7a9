"""A trained model, written for use elsewhere."""

from dataclasses import dataclass, replace
from pathlib import Path

from data.classes.display_names import match_display_names
from data.remote.web_address import without_secrets
from models.model_facts import ModelFacts
from pipeline.errors import ConfigError
from pipeline.exports.destination import ExportFormat, check_destination, export_format, is_folder, publication
from pipeline.exports.formats import (
    refuse_without_onnx,
    refuse_without_timm_equivalent,
    save_onnx,
    save_safetensors,
    save_timm,
    save_torch,
)
from pipeline.recipe.section import WhichWeights
from pipeline.trained_model import TrainedModel, open_trained_model


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written."""

    destination: Path
    format: ExportFormat
    facts: ModelFacts
    bytes: int
    """Of all files."""
    difference: float | None
    """Greatest difference of a logit between what was written and the model; None if they were not compared."""
    compared_by: str | None
    """The program by which they were; None for safetensors and timm, whose values are the model's own."""
    remarks: tuple[str, ...]
    """What was assumed, is not known or does not match, in sentences."""


def export(
    location: str,
    destination: Path,
    which: WhichWeights = "auto",
    wanted: ExportFormat | None = None,
    names: Path | None = None,
) -> ExportReport:
    """Write the trained model at `location` to `destination`, which is replaced once everything is written.

    Args:
        location: as for `open_trained_model`.
        destination: a folder or file.
        which: the raw weights, their moving average, or `auto`: the average where there is one.
        wanted: the format; by default that of the destination's suffix, and safetensors without one.
        names: a file with names of the classes for people, see `read_display_names`.

    Raises:
        ConfigError, DataError: no trained model there, a damaged one, one without the requested weights, a variant
            that the format cannot express, a names file that does not fit, or a destination whose name contradicts the
            format or that cannot be written.
        RunFailed: what was written does not compute what the model does.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    chosen = export_format(destination, wanted)
    check_destination(destination, chosen)
    if chosen == "onnx":
        refuse_without_onnx()
    with open_trained_model(location, which) as trained:
        facts, remarks = _named(trained.facts, names)
        if chosen == "timm":
            refuse_without_timm_equivalent(trained.variant, facts.arguments["name"])
        return _written(trained, facts, destination, chosen, remarks)


def _written(
    trained: TrainedModel, facts: ModelFacts, destination: Path, chosen: ExportFormat, remarks: tuple[str, ...]
) -> ExportReport:
    difference, compared_by = None, None
    folder = is_folder(destination, chosen)
    # Read before anything is written, so that an error is not taken for one of the destination.
    model = trained.build() if chosen in ("onnx", "torch") else None
    tensors = trained.parameters() | trained.buffers() if model is None else {}
    with publication(destination, folder=folder) as unfinished:
        path = unfinished / destination.name
        if model is None:
            if chosen == "timm":
                save_timm(tensors, facts, trained.variant, unfinished)
            else:
                save_safetensors(tensors, facts, unfinished, None if folder else destination.name)
        elif chosen == "onnx":
            difference, compared_by = save_onnx(model, facts, path), "onnxruntime"
        else:
            difference, compared_by = save_torch(model, facts, path), "torch.export.load"
        size = sum(file.stat().st_size for file in unfinished.iterdir())
    return ExportReport(destination, chosen, facts, size, difference, compared_by, remarks)


def _named(facts: ModelFacts, names: Path | None) -> tuple[ModelFacts, tuple[str, ...]]:
    """The facts with the names for people of a file, and what does not match."""
    source = replace(facts.source, resolved=without_secrets(facts.source.resolved))
    facts = replace(facts, source=source)
    if names is None:
        return facts, facts.remarks
    if facts.classes is None:
        raise ConfigError(
            f"{names}: cannot be matched, since the names of the model's classes are not known; leave out --names"
        )
    found = match_display_names(names, facts.classes)
    return replace(facts, display_names=found.names), (*facts.remarks, *found.remarks(str(names)))
