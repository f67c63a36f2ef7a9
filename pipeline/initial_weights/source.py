"""Weights that a stage starts from: what is known about them, and their tensors by the model's names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from data.remote.storage import Storage
from models.coatnet import CoAtNet
from models.differences import differences_text, variant_differences
from models.variants import find_variant
from pipeline.errors import ConfigError
from pipeline.recipe.section import WhichWeights
from pipeline.runs.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Weights to start from.

    Args:
        location: path or URL of the checkpoint or file.
        origin: what they are, for a person: such as `stage pretrain`.
        weights: the trained ones, or their moving average.
        step: steps of its stage that they were trained for, if that is known.
        num_classes: outputs of the classifier; 0 for none.
        classes: their names, if they are known.
        classes_digest: identifies the names, if that is known.
        precision: of the training, if that is known.
        parameters, buffers: by the model's names, float32.
        zeros: parameters that the source has none of, and that are zero in a model that computes the same.
        left_out: what the source has besides, and how many of it.
        remarks: what had to be assumed, in sentences.
    """

    location: str
    origin: str
    weights: Literal["raw", "ema"]
    step: int | None
    num_classes: int
    classes: tuple[str, ...] | None
    classes_digest: str | None
    precision: str | None
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    zeros: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What a stage asks of its source.

    Args:
        location: path or URL, as the recipe has it resolved; or the final checkpoint of an earlier stage.
        which: of the weights.
        storage: how a URL is reached.
        model: that will have the weights, perhaps without values.
        earlier: the run folder of the earlier stage, if the location is its checkpoint.
        model_name: by which the recipe calls the model, for messages.
    """

    location: str
    which: WhichWeights
    storage: Storage
    model: CoAtNet
    model_name: str
    earlier: RunFolder | None = None


def refuse_other_variant(request: Request, location: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a model of other `arguments` of `create_model` than the requested one.

    Raises:
        ConfigError: what differs, and which settings match.
    """
    options = {key: value for key, value in arguments.items() if key not in ("name", "num_classes", "image_size")}
    try:
        theirs = find_variant(str(arguments["name"]), **options)
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{location}: its model cannot be made ({error}); restore it from a copy") from None
    if differences := variant_differences(theirs, request.model.variant):
        raise ConfigError(f"{location}: {differences_text(differences, request.model_name)}")


def meta(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same shapes without values."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
