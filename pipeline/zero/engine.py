"""A model in training under DeepSpeed ZeRO with AdamW: what the training loop needs of it, and nothing of DeepSpeed."""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from models.coatnet import CoAtNet
from pipeline.compiler import compiler_options
from pipeline.precision import model_dtype
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import TrainStage
from pipeline.zero.fragments import Fragment, holders, parameter_slices
from pipeline.zero.optimizer import AdamW, ParameterTable, build_adamw, ranges_without_gradient, scaled_ranges


class ZeroEngine:
    """A model whose weights, gradients and AdamW state are sharded; all ranks call its methods in the same order.

    `build_engine` makes one.

    Attributes:
        module: the model. With ZeRO 3 its parameters are empty outside a forward.
        parameters: shapes, weight decay and learning-rate scales of its parameters.
        dtype: of the images that it takes.
        masters: the float32 weights that this rank optimizes, as AdamW's tensors.
    """

    def __init__(self, engine: Any, adamw: AdamW, parameters: ParameterTable, stage: TrainStage, ranks: Ranks) -> None:
        self.module = cast(CoAtNet, engine.module)
        self.parameters = parameters
        self.dtype = model_dtype(stage.precision)
        self._engine, self._adamw = engine, adamw
        self._zero = None if engine.optimizer is adamw else engine.optimizer
        """DeepSpeed's optimizer around AdamW; stage 0 without bf16 has none."""
        assert self._zero is None or self._zero.optimizer is adamw
        self._zero_stage, self._ranks = stage.zero_stage, ranks
        self._no_gradient = torch.zeros((), device=ranks.device)
        self._slices = parameter_slices(engine, ranks)
        self.masters = holders(self._slices)
        adamw.without_gradient = ranges_without_gradient(self._slices, parameters.without_gradient)
        if stage.optimizer.layer_decay < 1.0:
            adamw.scales = scaled_ranges(self._slices, parameters.rate_scales)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalized images (B, S, S, 3) of `dtype`."""
        logits: Tensor = self._engine(images)
        return logits

    def train(self) -> None:
        """Switch to training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Switch to evaluation mode."""
        self._engine.eval()

    def micro_batches(self, number: int) -> AbstractContextManager[None]:
        """Inside, forwards and recomputations under autocast cast each weight once; leave it before `step`.

        For the `number` micro-batches of one step, whose weights are the same. Without effect for a single one, where
        the casts would be held during its whole backward for nothing, and with ZeRO 3, as they are whole weights.
        """
        # Autocast drops its casts at the end of the outermost context, and this is one, though it enables nothing:
        # otherwise that of each forward, which DeepSpeed opens, or of each recomputation.
        if number == 1 or self._zero_stage == 3:
            return nullcontext()
        return torch.autocast(self._ranks.device.type, enabled=False)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss to that of the step."""
        self._engine.backward(loss)

    def accumulate(self) -> None:
        """Continue with the next micro-batch of the step: called after each `backward` but the last."""
        self._engine.step()  # only counts: DeepSpeed applies the gradient with the last micro-batch

    def step(self, loss: Tensor, on_gradient: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Apply the accumulated gradient, unless its norm or `loss` is not finite, without waiting for either.

        A step that is not applied changes nothing: the next one is as if this one's gradient had never existed.

        Args:
            loss: () float32 on the device, the same on all ranks.
            on_gradient: called with the name of a parameter and a view (n,) of its averaged gradient before clipping,
                for every range that this rank optimizes; where all ranks hold everything, on one of them.

        Returns:
            The global norm of the gradient before clipping, () float32 on the device; nan or inf if it is not finite.
        """
        zero: Any = self._zero
        own = self._gradient_norm()
        if own is None:
            # DeepSpeed sets the norm before it calls AdamW; in case it does not, that of an earlier step must not be
            # used. Its norm of gradients that are not finite is inf or -1, and a number where it checks them itself.
            zero._global_grad_norm = math.nan

        def norm() -> Tensor:
            found = zero._global_grad_norm if own is None else own
            return found if isinstance(found, Tensor) else torch.full_like(loss, found)

        def checked_norm() -> Tensor:
            if on_gradient:
                self._show_gradient(on_gradient)
            return torch.where(loss.isfinite(), norm(), math.nan)

        self._adamw.gradient_norm = checked_norm
        self._engine.step()
        self._adamw.gradient_norm = None
        found = norm()
        return torch.where(found < 0, math.inf, found)

    def _show_gradient(self, on_gradient: Callable[[str, Tensor], None]) -> None:
        # With ZeRO 3, AdamW is called for a part of the tensors at a time, and the others have no gradient then.
        for part in self._slices:
            if part.saved_here and part.holder.grad is not None:
                on_gradient(part.parameter, part.view(part.holder.grad))

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor | None:
        """The global norm of the averaged gradients, () float32, by a few kernels and without waiting.

        None where DeepSpeed computes it in any case: for bf16 weights with ZeRO 1, and with ZeRO 3.
        """
        if self._zero is None:  # the gradients are whole, and equal on all ranks
            return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        if getattr(self._zero, "compute_grad_norm", True):
            return None
        # Like DeepSpeed's own in float64 up to the sum over the ranks, and seen to differ by one bit at most. That one
        # launches three kernels for each parameter, and waits once for each group.
        squares = [
            torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum().float()
            if gradients
            else self._no_gradient
            for group in self._zero.averaged_gradients.values()
            for gradients in [[g for g in group if not getattr(g, "_zero_padding", False)]]
        ]
        norm: Tensor = torch.linalg.vector_norm(self._ranks.sum(torch.stack(squares)).sqrt())
        return norm

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step, of which each layer takes its fraction."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has applied, which its bias correction depends on."""
        return self._adamw.steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._adamw.steps = steps

    def fragments(self, averages: list[Tensor] | None = None) -> list[Fragment]:
        """The state that this rank holds, in parameter order. Creates AdamW's moments as zeros before the first step.

        Args:
            averages: moving averages of `masters`, in the same order.
        """
        numbers = {id(master): number for number, master in enumerate(self.masters)}
        result = []
        for part in self._slices:
            state = {"master": part.holder.data, **self._adamw.moments(part.holder)}
            if averages is not None:
                state["ema"] = averages[numbers[id(part.holder)]]
            views = {kind: part.view(tensor) for kind, tensor in state.items()}
            result.append(Fragment(part.parameter, part.start, part.stop, views, part.saved_here))
        return result

    @torch.no_grad()
    def write_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Copy whole float32 `weights` to what this rank holds of them; `publish_masters` makes forwards use them."""
        for part in self._slices:
            if part.parameter in weights:
                part.view(part.holder.data).copy_(weights[part.parameter].reshape(-1)[part.start : part.stop])

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Bring the weights that forwards use up to date on all ranks, after writing to the masters."""
        if self._zero is not None and self._zero_stage in (1, 2):
            self._zero.update_lp_params()
        elif self._zero is not None and self._zero_stage == 3:
            # Otherwise weights gathered by an earlier forward would keep their values.
            self._zero._partition_all_parameters()
            for number in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
        # Makes modules drop what they cached of earlier weights for evaluation.
        self.module.train(self.module.training)


def build_engine(model: CoAtNet, stage: TrainStage, ranks: Ranks) -> ZeroEngine:
    """Put `model` under DeepSpeed with AdamW; weight decay only where the model wants it.

    The stage's activation checkpointing, fused convolutions and compilation are applied to the model.
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
    # Otherwise an engine with autocast would decide how later ones of this process communicate.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        # DeepSpeed checks for the exact class, and would warn about ours.
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    model.set_grad_checkpointing(policy=stage.activation_checkpointing)
    model.set_fused_depthwise(stage.fused_depthwise)
    parameters = ParameterTable.of(model, stage.optimizer)
    model = model.to(ranks.device)
    # Their storage, which the cast of the model to bf16 replaces. DeepSpeed would start the masters from the cast.
    cast = model.named_parameters() if stage.precision == "bf16" else ()
    initial = {name: parameter.detach() for name, parameter in cast}
    adamw = build_adamw(model, stage.optimizer, parameters.undecayed)
    with _without_compiler():
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=_configuration(stage, ranks))
    # BatchNorm's statistics lose small movements in bf16; DeepSpeed before 0.19.2 would cast them.
    assert all(buffer.dtype == torch.float32 for buffer in engine.module.buffers())
    zero_engine = ZeroEngine(engine, adamw, parameters, stage, ranks)
    zero_engine.write_masters(initial)  # the weights that forwards use are the cast of these
    if stage.compile:
        # Last, because DeepSpeed has moved the parameters into its flat buffers by now. Checkpointing wraps the
        # compiled blocks, and recomputes them.
        model.compile_blocks(dynamic=False, options=compiler_options(deterministic=stage.deterministic))
    return zero_engine


def import_deepspeed() -> None:
    """Import what `build_engine` imports, in processes that fork others which build one."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.runtime.engine
    import deepspeed.runtime.torch_autocast

    with _without_compiler():
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


@contextmanager
def _without_compiler() -> Iterator[None]:
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
        # Our AdamW clips.
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage.zero_stage,
            "memory_efficient_linear": False,  # it patches F.linear for the whole process
            "reduce_bucket_size": stage.communication.bucket_size,
            **({} if stage.communication.overlap is None else {"overlap_comm": stage.communication.overlap}),
        },
        # By default, gradients are rounded to bf16 and summed over the ranks as such, however they are accumulated.
        "communication_data_type": stage.communication.gradients,
        "steps_per_print": sys.maxsize,
    }
    if stage.precision == "bf16":
        # Immediately: each bf16 gradient is freed when it has been added to its float32 sum, not after the step.
        # Our AdamW checks the gradient, without a pass over it and without waiting for the result.
        configuration["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
    elif stage.precision == "bf16_autocast":
        # No modules whose gradients, and parameters in ZeRO 3, would be communicated in bf16.
        configuration["torch_autocast"] = {
            "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        }  # fmt: skip
    if stage.zero_stage == 2 or (stage.zero_stage == 1 and stage.precision != "bf16"):
        configuration["zero_optimization"]["compute_grad_norm"] = False  # see `ZeroEngine._gradient_norm`
    return configuration
