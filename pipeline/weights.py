"""A stage's model, and weights of an earlier stage's checkpoint fitted to it."""

from typing import Literal

import torch
from torch import Tensor, nn

from models.adaptation import adapt_parameters
from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.plan import Plan
from pipeline.recipe.sections import WhichWeights


def build_model(plan: Plan, device: torch.device | None = None) -> CoAtNet:
    """The stage's model with its initial weights, float32 on `device`, by default the CPU: the same on every rank."""
    rate = plan.stage.model.drop_path_rate
    return create_model(**plan.model_arguments, drop_path_rate=rate, seed=plan.seed, device=device)


def chosen_weights(checkpoint: Checkpoint, which: WhichWeights) -> Literal["raw", "ema"]:
    """Which of the checkpoint's weights `which` means: `auto` is the moving average where there is one.

    Raises:
        ConfigError: the moving average is requested and there is none.
    """
    if which == "ema" and not checkpoint.has_average:
        raise ConfigError(f"{checkpoint.location}: holds no moving average; use the raw weights, or auto")
    return "ema" if checkpoint.has_average and which != "raw" else "raw"


def fitted_weights(
    model: CoAtNet, checkpoint: Checkpoint, which: WhichWeights = "auto", classes_digest: str | None = None
) -> dict[str, Tensor]:
    """The checkpoint's weights resized to `model`; its buffers are copied into `model` directly.

    The classifier is left out if it is for other classes: another number of them, or another `classes_digest`.

    Raises:
        ConfigError: the checkpoint is another model's, or the moving average is requested and there is none.
    """
    chosen = chosen_weights(checkpoint, which)
    try:
        weights = adapt_parameters(checkpoint.parameters(chosen), model)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.location}: {error}; start from a stage that trained the same model") from None
    load_buffers(model, checkpoint, chosen)
    if classes_digest is not None and checkpoint.manifest.facts.run.digests.classes_digest != classes_digest:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.classifier.")}
    return weights


def load_weights(
    model: CoAtNet, checkpoint: Checkpoint, which: WhichWeights = "auto", classes_digest: str | None = None
) -> None:
    """Fill `model` with the checkpoint's weights and buffers.

    Raises:
        ConfigError: the checkpoint is another model's, its classifier has other classes, or the moving average
            is requested and there is none.
    """
    weights = fitted_weights(model, checkpoint, which, classes_digest)
    missing = dict(model.named_parameters()).keys() - weights.keys()
    if missing:
        raise ConfigError(
            f"{checkpoint.location}: trained for other classes than the {model.num_classes} of the data "
            f"({', '.join(sorted(missing))}); evaluate it on data of its own classes"
        )
    copy_tensors(weights, dict(model.named_parameters()))


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
