"""A stage's model, and weights from an earlier stage's checkpoint made to fit it."""

import torch
from torch import Tensor, nn

from models.adaptation import adapt_parameters
from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.plan import Plan


def build_model(plan: Plan, device: torch.device | None = None) -> CoAtNet:
    """The stage's model with its initial weights, float32 on `device`, by default the CPU: the same on every rank."""
    model, stage = plan.stage.model, plan.stage
    return create_model(
        model.name,
        num_classes=len(plan.classes),
        image_size=stage.resolution,
        drop_path_rate=model.drop_path_rate,
        seed=plan.seed,
        device=device,
        **model.options,
    )


def fitted_weights(model: CoAtNet, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's weights resized to `model`; its buffers go into `model` at once.

    Raises:
        ConfigError: the checkpoint is another model's.
    """
    try:
        weights = adapt_parameters(checkpoint.parameters(), model)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.location}: {error}; start from a stage that trained the same model") from None
    load_buffers(model, checkpoint)
    return weights


def load_weights(model: CoAtNet, checkpoint: Checkpoint) -> None:
    """Fill `model` with the checkpoint's weights and buffers.

    Raises:
        ConfigError: the checkpoint is another model's, or its classifier has other classes.
    """
    weights = fitted_weights(model, checkpoint)
    missing = dict(model.named_parameters()).keys() - weights.keys()
    if missing:
        raise ConfigError(
            f"{checkpoint.location}: trained for another number of classes than the {model.num_classes} of the data "
            f"({', '.join(sorted(missing))}); evaluate it on data of its own classes"
        )
    _copy(weights, dict(model.named_parameters()))


def load_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's buffers into `model`.

    Raises:
        ConfigError: they are another model's.
    """
    try:
        _copy(checkpoint.buffers(), persistent_buffers(model))
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
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if source.keys() != target.keys() or any(source[name].shape != target[name].shape for name in source):
        raise ValueError("names or shapes differ from this model's")
    for name, tensor in source.items():
        target[name].copy_(tensor)
