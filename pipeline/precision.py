"""The precision of a stage, for a model with or without an engine."""

from contextlib import AbstractContextManager

import torch

from pipeline.recipe.schema import Precision


def model_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the weights that forwards use, and of the images that a model takes."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context in which a model without an engine computes as an engine of that precision does."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16_autocast")
