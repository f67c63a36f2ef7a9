"""Where DeepSpeed keeps the float32 state of each parameter, as ranges of it: one view for all ZeRO stages.

ZeRO 1 and 2 flatten the parameters of a group and give each rank one contiguous part, so a rank holds ranges of some
parameters. ZeRO 3 gives each rank one range of every parameter. Stage 0 has everything everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.ranks.distributed import Ranks


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Elements `start` .. `stop` of one flattened parameter, and where in AdamW's tensors this rank optimizes them."""

    parameter: str
    start: int
    stop: int
    holder: Tensor
    """The float32 tensor that AdamW updates; it holds ranges of many parameters, or all of one."""
    offset: int
    """Position of these elements in the flattened holder."""
    saved_here: bool
    """True on the one rank that writes this range to checkpoints."""

    def view(self, tensor: Tensor) -> Tensor:
        """These elements of `tensor`, which has the layout of the holder: a view (stop - start,)."""
        return tensor.view(-1).narrow(0, self.offset, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `start` .. `stop` of one flattened parameter, as views of the live state.

    `tensors` holds, each (stop - start,) float32: `master`, the weights; `exp_avg` and `exp_avg_sq`, AdamW's moments;
    `ema`, the moving average of the weights, if the run has one.
    """

    parameter: str
    start: int
    stop: int
    tensors: dict[str, Tensor]
    saved_here: bool
    """True on the one rank that writes this range to checkpoints."""


def parameter_slices(engine: Any, ranks: Ranks) -> list[ParameterSlice]:
    """Everything that this rank optimizes in a DeepSpeed engine, in parameter order."""
    layout = {0: _replicated, 1: _flattened, 2: _flattened, 3: _partitioned}[engine.zero_optimization_stage()]
    return list(layout(engine, ranks))


def holders(slices: list[ParameterSlice]) -> list[Tensor]:
    """The tensors that AdamW knows, each once: the float32 masters of this rank."""
    return list({id(part.holder): part.holder for part in slices}.values())


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
