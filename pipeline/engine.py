"""The DeepSpeed engine: built from a stage, with AdamW, and asked for what the training loop needs."""

import logging
import sys
from typing import Any

import torch

from models.coatnet import CoAtNet
from pipeline.distributed import Ranks
from pipeline.recipe import TrainStage


def build_engine(model: CoAtNet, stage: TrainStage, ranks: Ranks) -> Any:
    """A DeepSpeed engine over `model` with AdamW; weight decay only where the model wants it.

    The stage's activation checkpointing and compilation are applied to the model.
    """
    import deepspeed

    deepspeed.utils.logger.handlers.clear()
    deepspeed.utils.logger.propagate = True
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        # It would compile a shared-memory all-reduce for a minute or two at first use, and fail without a compiler.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    model.set_grad_checkpointing(policy=stage.activation_checkpointing)
    buffers = [buffer.dtype for buffer in model.buffers()]
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device), optimizer=_adamw(model, stage), config=_configuration(stage, ranks)
    )
    # BatchNorm's statistics lose small movements in bf16; DeepSpeed before 0.19.2 would cast them.
    assert [buffer.dtype for buffer in engine.module.buffers()] == buffers
    if stage.compile:
        # Last: what is compiled are the parameters that DeepSpeed has put into its flat buffers. Checkpointing lies
        # outside, so that it recomputes compiled blocks.
        model.compile_blocks(dynamic=False)
    return engine


def _adamw(model: CoAtNet, stage: TrainStage) -> torch.optim.AdamW:
    spared = model.no_weight_decay()
    decayed = [p for name, p in model.named_parameters() if name not in spared]
    undecayed = [p for name, p in model.named_parameters() if name in spared]
    settings = stage.optimizer
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": undecayed, "weight_decay": 0.0}],
        lr=settings.peak_learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def _configuration(stage: TrainStage, ranks: Ranks) -> dict[str, Any]:
    configuration: dict[str, Any] = {
        "train_batch_size": stage.batch.global_size,
        "train_micro_batch_size_per_gpu": stage.batch.micro_size,
        "gradient_accumulation_steps": stage.batch.micro_batches // ranks.world_size,
        "gradient_clipping": stage.optimizer.gradient_clip,
        "zero_allow_untested_optimizer": True,
        # memory_efficient_linear patches F.linear for the whole process.
        "zero_optimization": {"stage": stage.zero_stage, "memory_efficient_linear": False},
        "steps_per_print": sys.maxsize,
    }
    if stage.precision == "bf16":
        configuration["bf16"] = {"enabled": True}
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
    return configuration


def set_learning_rate(engine: Any, rate: float) -> None:
    """The rate of the next step, in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(engine: Any) -> float:
    """Apply the accumulated gradient; returns its global norm before clipping."""
    norm = None
    if engine.zero_optimization_stage() == 0:
        # DeepSpeed keeps no norm there. The gradients are the averaged ones by now, equal on all ranks.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return float(norm)


def model_dtype(precision: str) -> torch.dtype:
    """Dtype of activations."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
