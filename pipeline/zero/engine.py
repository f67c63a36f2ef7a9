"""The DeepSpeed engine: built from a stage, with AdamW, and asked for what the training loop needs."""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from models.coatnet import CoAtNet
from pipeline.distributed import Ranks
from pipeline.recipe.schema import Precision, TrainStage
from pipeline.zero.fragments import parameter_slices, torch_optimizer
from pipeline.zero.optimizer import AdamW, build_adamw, layer_numbers, rate_scales, scaled_ranges


def build_engine(model: CoAtNet, stage: TrainStage, ranks: Ranks) -> Any:
    """A DeepSpeed engine over `model` with AdamW; weight decay only where the model wants it.

    The stage's activation checkpointing and compilation are applied to the model.
    """
    import deepspeed
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    deepspeed.utils.logger.handlers.clear()
    deepspeed.utils.logger.propagate = True
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        # It would compile a shared-memory all-reduce for a minute or two at first use, and fail without a compiler.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    # Else an engine with autocast would decide how later ones of the process communicate.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        # DeepSpeed goes by the very class, and would warn of ours.
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    model.set_grad_checkpointing(policy=stage.activation_checkpointing)
    scales = rate_scales(layer_numbers(model), stage.optimizer.layer_decay)
    adamw = build_adamw(model, stage.optimizer)
    with _compiling_nothing():
        engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device), optimizer=adamw, config=_configuration(stage, ranks)
        )
    # BatchNorm's statistics lose small movements in bf16; DeepSpeed before 0.19.2 would cast them.
    assert all(buffer.dtype == torch.float32 for buffer in engine.module.buffers())
    if stage.optimizer.layer_decay < 1.0:
        adamw.scales = scaled_ranges(parameter_slices(engine, ranks), scales)
    if stage.compile:
        # Last: what is compiled are the parameters that DeepSpeed has put into its flat buffers. Checkpointing lies
        # outside, so that it recomputes compiled blocks.
        model.compile_blocks(dynamic=False)
    return engine


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """Inside, torch.compile leaves functions as they are.

    DeepSpeed imports its Muon, which is decorated with it, whichever optimizer is used: without this, a start takes
    1.5 s more, for importing the compiler.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _configuration(stage: TrainStage, ranks: Ranks) -> dict[str, Any]:
    configuration: dict[str, Any] = {
        "train_batch_size": stage.batch.global_size,
        "train_micro_batch_size_per_gpu": stage.batch.micro_size,
        "gradient_accumulation_steps": stage.batch.micro_batches // ranks.world_size,
        "gradient_clipping": stage.optimizer.gradient_clip,
        # memory_efficient_linear patches F.linear for the whole process.
        "zero_optimization": {"stage": stage.zero_stage, "memory_efficient_linear": False},
        # Otherwise gradients, however they are accumulated, are rounded to bf16 and summed over the ranks as such.
        "communication_data_type": "fp32",
        "steps_per_print": sys.maxsize,
    }
    if stage.precision == "bf16":
        # Immediately: each bf16 gradient is freed when it has been added to its float32 sum, not after the step.
        configuration["bf16"] = {"enabled": True, "immediate_grad_update": True}
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
    elif stage.precision == "bf16_autocast":
        # No modules whose gradients, and parameters in ZeRO 3, would be communicated in bf16.
        configuration["torch_autocast"] = {
            "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        }  # fmt: skip
    return configuration


def set_learning_rate(engine: Any, rate: float) -> None:
    """The rate of the next step, in every parameter group; layers have their fractions of it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(engine: Any, *, apply: bool = True) -> float:
    """Apply the accumulated gradient, unless its norm is not finite or `apply`, alike on all ranks, is False.

    A step that is not applied changes nothing: the next one is as if this one's gradient had never been.

    Returns:
        The global norm of the gradient before clipping; nan or inf if it is not finite.
    """
    adamw, zero = torch_optimizer(engine), engine.optimizer
    assert isinstance(adamw, AdamW)
    if zero is adamw:
        # Stage 0 keeps no norm. The gradients are the averaged ones by now, equal on all ranks.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        adamw.allowed = lambda: apply and math.isfinite(norm)
        engine.step()
    else:
        # It is computed before AdamW is called; should it not be, an earlier step's must not be taken for it. Where
        # gradients are not finite, DeepSpeed's norms are inf or -1.
        zero._global_grad_norm = math.nan
        adamw.allowed = lambda: apply and 0.0 <= float(zero._global_grad_norm) < math.inf
        engine.step()
        norm = float(zero._global_grad_norm)
    adamw.allowed = lambda: False
    return norm


def model_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the weights that forwards use, and of the pictures that a model takes."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """What a model without an engine computes in, so that it computes as an engine of the precision does."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16_autocast")
