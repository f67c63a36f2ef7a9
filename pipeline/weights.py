"""A stage's model, and weights of an earlier stage's checkpoint fitted to it."""

from typing import Literal

import torch
from torch import Tensor, nn

from models.coatnet import CoAtNet
from models.pretrained import model_without_values
from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.plan import Plan
from pipeline.recipe.section import WhichWeights


def build_model(plan: Plan, device: torch.device | None = None) -> CoAtNet:
    """The stage's model with its initial weights, float32 on `device`, by default the CPU: the same on every rank."""
    rate = plan.stage.model.drop_path_rate
    return create_model(**plan.model_arguments, drop_path_rate=rate, seed=plan.seed, device=device)


def described_model(checkpoint: Checkpoint) -> CoAtNet:
    """The model that the manifest of a checkpoint describes, on the meta device.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        return model_without_values(checkpoint.manifest.facts.run.model, len(checkpoint.shapes))
    except ValueError as error:
        raise ConfigError(f"{checkpoint.location}: {error}; restore it from a copy") from None


def chosen_weights(checkpoint: Checkpoint, which: WhichWeights) -> Literal["raw", "ema"]:
    """Which of the checkpoint's weights `which` means: `auto` is the moving average where there is one.

    Raises:
        ConfigError: the moving average is requested and there is none.
    """
    if which == "ema" and not checkpoint.has_average:
        raise ConfigError(f"{checkpoint.location}: holds no moving average; use the raw weights, or auto")
    return "ema" if checkpoint.has_average and which != "raw" else "raw"


def load_buffers(model: nn.Module, checkpoint: Checkpoint, chosen: Literal["raw", "ema"]) -> None:
    """Copy the checkpoint's buffers, or their moving averages, into `model`.

    Raises:
        ConfigError: they are another model's.
    """
    try:
        copy_tensors(checkpoint.buffers(chosen), persistent_buffers(model))
    except ValueError as error:
        raise ConfigError(f"{checkpoint.location}: {error}; it holds another model's state") from None


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The live buffers that are part of the model's state, by name."""
    saved, everything = model.state_dict(keep_vars=True).keys(), dict(model.named_buffers())
    return {name: buffer for name, buffer in everything.items() if name in saved}


def to_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers stay float32, as in training."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy by name.

    Raises:
        ValueError: names or shapes differ.
    """
    if source.keys() != target.keys() or any(source[name].shape != target[name].shape for name in source):
        raise ValueError("names or shapes differ from this model's")
    for name, tensor in source.items():
        target[name].copy_(tensor)
