"""Where DeepSpeed keeps the float32 state of each parameter, as ranges of the parameter: the same view at every stage.

ZeRO 1 and 2 flatten the parameters of a group and give each rank one contiguous part, so a rank holds ranges of some
parameters. ZeRO 3 gives each rank one range of every parameter. Stage 0 has everything everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import Ranks

OPTIMIZER_KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Elements `start` .. `stop` of one flattened parameter, and where this rank optimizes them."""

    parameter: str
    start: int
    stop: int
    holder: Tensor
    """The float32 tensor that AdamW knows; it holds ranges of many parameters, or all of one."""
    offset: int
    """Of these elements in the flattened holder."""
    saved_here: bool
    """True on the one rank that writes this range."""

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of `tensor`, which is laid out as the holder: a view (stop - start,)."""
        return tensor.view(-1).narrow(0, self.offset, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `start` .. `stop` of one flattened parameter; the tensors are views of the live state.

    `tensors` holds, each (stop - start,) float32: `master`, the weights; `exp_avg` and `exp_avg_sq`, AdamW's moments;
    `ema`, the moving average of the weights, where there is one.
    """

    parameter: str
    start: int
    stop: int
    tensors: dict[str, Tensor]
    saved_here: bool
    """True on the one rank that writes this range."""


def parameter_slices(engine: Any, ranks: Ranks) -> list[ParameterSlice]:
    """Everything that this rank optimizes, in parameter order."""
    stage = engine.zero_optimization_stage()
    of_stage = {0: _replicated, 1: _flattened, 2: _flattened, 3: _partitioned}[stage]
    return list(of_stage(engine, ranks))


def holders(everything: list[ParameterSlice]) -> list[Tensor]:
    """The tensors that AdamW knows, each once: the float32 masters of this rank."""
    return list({id(place.holder): place.holder for place in everything}.values())


def fragments(engine: Any, ranks: Ranks, averages: list[Tensor] | None = None) -> list[Fragment]:
    """The state that this rank holds, in parameter order. Creates AdamW's moments as zeros before the first step.

    `averages` are moving averages of the `holders`, in their order.
    """
    everything = parameter_slices(engine, ranks)
    own = {id(holder): number for number, holder in enumerate(holders(everything))}
    result = []
    for place in everything:
        state = {"master": place.holder.data, **_moments(engine, place.holder)}
        if averages is not None:
            state["ema"] = averages[own[id(place.holder)]]
        views = {kind: place.of(tensor) for kind, tensor in state.items()}
        result.append(Fragment(place.parameter, place.start, place.stop, views, place.saved_here))
    return result


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that the engine was given."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def optimizer_steps(engine: Any) -> int:
    """How often AdamW has stepped."""
    states = torch_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Set AdamW's own count, which its bias correction reads."""
    for state in torch_optimizer(engine).state.values():
        state["step"].fill_(steps)


@torch.no_grad()
def publish_masters(engine: Any) -> None:
    """After writing to the `master` views: bring the weights that forwards use up to date, on all ranks."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        # Weights gathered by an earlier forward would stay as they were.
        engine.optimizer._partition_all_parameters()
        for number in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)
    # What modules keep of earlier weights in evaluation is forgotten with this call.
    engine.module.train(engine.module.training)


def _moments(engine: Any, holder: Tensor) -> dict[str, Tensor]:
    """AdamW's state of the tensor it optimizes, created as its first step would."""
    state = torch_optimizer(engine).state[holder]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=holder.device)
        for kind in OPTIMIZER_KINDS:
            state[kind] = torch.zeros_like(holder, memory_format=torch.preserve_format)
    return {kind: state[kind] for kind in OPTIMIZER_KINDS}


def _replicated(engine: Any, ranks: Ranks) -> Iterator[ParameterSlice]:
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        # Each rank writes a share, so that saving takes no longer than with sharded state.
        yield ParameterSlice(name, 0, parameter.numel(), parameter, 0, number % ranks.world_size == ranks.rank)


def _flattened(engine: Any, ranks: Ranks) -> Iterator[ParameterSlice]:
    optimizer = engine.optimizer
    partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if partitions is None:  # BF16_Optimizer, DeepSpeed's choice for ZeRO 1 in bf16 with fp32 accumulation
        partitions = optimizer.fp32_groups_flat_partition
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        here, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield ParameterSlice(
            name, here.start, here.start + here.numel, partitions[mapping.param_group_index], flat.start, True
        )


def _partitioned(engine: Any, ranks: Ranks) -> Iterator[ParameterSlice]:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        share = parameter.ds_tensor.ds_numel
        start = min(ranks.rank * share, parameter.ds_numel)
        stop = min(start + share, parameter.ds_numel)  # the last rank's share is padded
        if start == stop:
            continue
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        yield ParameterSlice(name, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset, True)
