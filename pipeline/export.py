"""A checkpoint's weights as one safetensors file, for use of the model outside training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.files.atomic_file import atomic_path
from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.resume import open_verified
from pipeline.errors import ConfigError
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.sections import WhichWeights
from pipeline.weights import chosen_weights


def export(checkpoint: str, destination: Path, which: WhichWeights = "auto") -> dict[str, str]:
    """Write whole float32 weights and buffers, by the model's own names, to the safetensors file `destination`.

    Args:
        checkpoint: path or URL of a checkpoint.
        destination: replaced if it exists, once everything is written.
        which: the raw weights, their moving average, or `auto`: the average where there is one.

    Returns:
        The file's metadata: `model`, the arguments of `models.registry.create_model` as JSON; `weights`, `raw` or
        `ema`; `step`, steps trained; `classes`, what identifies the list of its classes; `source`, the checkpoint.

    Raises:
        ConfigError: no checkpoint there, a damaged one, one without the requested average, or a destination that
            cannot be written.
    """
    source = open_verified(checkpoint, Ranks(0, 1, torch.device("cpu")))
    chosen = chosen_weights(source, which)
    model = source.manifest.facts.run.model
    expected = _model_tensors(source)
    tensors = source.parameters(chosen) | source.buffers(chosen)
    _refuse_other_tensors(source, tensors, expected)
    metadata = {
        "format": "pt",  # by which other programs recognize tensors of PyTorch
        "model": json.dumps(model),
        "weights": chosen,
        "step": str(source.step),
        "classes": source.manifest.facts.run.digests.classes_digest,
        "source": source.location,
    }
    _publish(tensors, metadata, destination)
    return metadata


def _model_tensors(source: Checkpoint) -> dict[str, Tensor]:
    """The parameters and buffers, without values, of the model that the manifest describes."""
    model = source.manifest.facts.run.model
    try:
        if sum(model.get("depths") or ()) > len(source.shapes):
            raise ValueError(f"depths {str(model['depths'])[:80]} are more blocks than there are parameters")
        return create_model(**model, device="meta").state_dict()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{source.location}: no model can be made of the arguments in its manifest ({reason}); restore it from a "
            "copy"
        ) from None


def _refuse_other_tensors(source: Checkpoint, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of the model: the metadata must be enough to load the file."""
    for name in sorted(expected.keys() | found.keys()):
        there, here = (_kind(tensors.get(name)) for tensors in (found, expected))
        if there != here:
            raise ConfigError(
                f"{source.location}: {name} is {there} there and {here} in the model that its manifest describes; "
                "restore it from a copy"
            )


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _publish(tensors: dict[str, Any], metadata: dict[str, str], destination: Path) -> None:
    try:
        with atomic_path(destination) as unfinished:
            save_file(tensors, unfinished, metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{destination}: cannot be written ({error}); give another file, or free some space"
        ) from None
