"""An estimate of the memory that training needs, by kind, on a GPU or a host; and what to change when it is full."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from data.text.counted import counted
from pipeline.errors import RunFailed
from pipeline.host import this_host
from pipeline.plan import TrainPlan
from pipeline.planner.memory import step_memory
from pipeline.planner.trace.training_trace import workload
from pipeline.recipe.schema import TrainStage
from pipeline.state_bytes import checkpoint_bytes

_PROCESS = 450_000_000
"""Bytes of a rank on the host before it has a model: Python, torch for CPUs and DeepSpeed, as measured on Linux."""
_ALLOCATION_FAILURES = ("DefaultCPUAllocator", "Cannot allocate memory", "not enough memory: you tried to allocate")
"""In the RuntimeErrors that torch raises when the host's memory is full."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank at the moment of a step when most is in use, beside what kernels allocate for themselves."""

    weights: int
    """With BatchNorm's statistics."""
    gradients: int
    optimizer_state: int
    """Float32 master weights, unless they are the weights themselves, and AdamW's two moments."""
    moving_average: int
    buckets: int
    """Buffers in which gradients are reduced during the backward, and weights that ZeRO 3 has gathered."""
    activations: int
    """Of a micro-batch, with temporary tensors, and gradients and casts of weights that live meanwhile."""
    staging: int
    """On the host: the copy from which a checkpoint is written while training continues."""

    @property
    def device(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "staging")

    @property
    def host(self) -> int:
        """Bytes in main memory of a rank without a GPU. Pages of buckets that no gradient fills are never touched."""
        return _PROCESS + self.staging + self.device - self.buckets

    @property
    def kinds(self) -> str:
        """The kinds of GPU memory with their sizes, for people; the largest first."""
        return _largest_first(
            {field.name: getattr(self, field.name) for field in fields(self) if field.name != "staging"}
        )

    @property
    def host_kinds(self) -> str:
        """The same for what `host` counts."""
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "buckets"}
        return _largest_first({"process": _PROCESS, **held}, least=50_000_000)


def _largest_first(sizes: dict[str, int], least: int = 1) -> str:
    held = sorted(((size, name) for name, size in sizes.items()), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {_gigabytes(size)}" for size, name in held if size >= least)


def estimate_memory(stage: TrainStage, classes: int, world_size: int, *, on_cpu: bool = False) -> MemoryEstimate:
    """The memory of each of `world_size` ranks that train `stage`: the planner's, from a trace of a micro-batch.

    `on_cpu` is for ranks without GPUs, where attention stores its scores.
    """
    step = step_memory(
        workload(stage, classes),
        stage.zero_stage,
        world_size,
        moving_average=stage.ema_decay is not None,
        rounds=max(1, stage.batch.micro_batches // world_size),
        communication=stage.communication,
        on_cpu=on_cpu,
    )
    share = checkpoint_bytes(stage, -(-step.parameters // world_size))
    return MemoryEstimate(
        weights=step.weights + step.buffers,
        gradients=step.gradients,
        optimizer_state=step.optimizer_state,
        moving_average=step.moving_average,
        buckets=step.buckets,
        activations=step.working,
        staging=share,
    )


def out_of_memory(error: BaseException, plan: TrainPlan, world_size: int, *, begun: bool) -> RunFailed:
    """The error for a GPU whose memory is full: what it is used for, and which settings to change first.

    Args:
        error: torch.OutOfMemoryError, whose message has the size of the failed allocation.
        plan: of the stage.
        world_size: number of ranks.
        begun: whether the run has a checkpoint, after which its micro-batch must not change.
    """
    memory = estimate_memory(plan.stage, len(plan.classes), world_size)
    reason = str(error).partition("\n")[0].rstrip(".")
    parts = [f"the GPU's memory is full ({reason})" if reason else "the GPU's memory is full"]
    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        parts.append(f"torch holds {_gigabytes(allocated)} and has reserved {_gigabytes(reserved)}")
    parts.append(
        f"by estimate each rank needs {_gigabytes(memory.device)}: {memory.kinds}, with micro-batches of "
        f"{plan.stage.batch.micro_size} on {world_size} ranks"
    )
    parts.append(remedies(plan.stage, len(plan.classes), world_size, begun=begun))
    return RunFailed(". ".join(part[0].upper() + part[1:] if number else part for number, part in enumerate(parts)))


def is_host_memory_full(error: BaseException) -> bool:
    """Whether `error` means that the memory of this machine, rather than of a GPU, is full."""
    if isinstance(error, MemoryError):
        return True
    full_gpu = isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, RuntimeError) and not full_gpu and any(s in str(error) for s in _ALLOCATION_FAILURES)


def out_of_host_memory(error: BaseException, plan: TrainPlan, *, begun: bool) -> RunFailed:
    """The error for a rank that gets no more memory on its machine; `begun` as for `out_of_memory`."""
    reason = str(error).partition("\n")[0].rstrip(".")
    full = f"the machine's memory is full ({reason})" if reason else "the machine's memory is full"
    return RunFailed(f"{full}. {host_advice(plan.stage, len(plan.classes), begun=begun)}")


def host_advice(stage: TrainStage, classes: int, *, begun: bool) -> str:
    """What the ranks of this machine need, what it has, and what to change; `begun` as for `out_of_memory`."""
    on_gpus = stage.resources.gpus_per_rank > 0 and torch.cuda.is_available()
    need, held = host_need(stage, classes, on_gpus=on_gpus)
    return (
        f"By estimate {counted(stage.resources.ranks_per_node, 'rank')} of this machine ({this_host().text}) need "
        f"{_gigabytes(need)}; each: {held}, with micro-batches of {stage.batch.micro_size}. "
        f"{host_remedies(stage, classes, on_gpus=on_gpus, begun=begun)}"
    )


def host_need(stage: TrainStage, classes: int, *, on_gpus: bool) -> tuple[int, str]:
    """Bytes of main memory of all ranks of a machine, and what each of them holds there, for people."""
    ranks = stage.resources.ranks_per_node
    memory = estimate_memory(stage, classes, stage.resources.ranks, on_cpu=not on_gpus)
    if not on_gpus:
        return ranks * memory.host, memory.host_kinds
    held = _largest_first({"process": _PROCESS, "staging": memory.staging})
    return ranks * (_PROCESS + memory.staging), held


def host_remedies(stage: TrainStage, classes: int, *, on_gpus: bool, begun: bool) -> str:
    """As `remedies`, for the main memory of a machine."""
    if on_gpus:
        return "Use more machines, or fewer ranks on each (resources.nodes, resources.ranks)"
    return remedies(stage, classes, stage.resources.ranks, begun=begun, on_host=True)


def remedies(stage: TrainStage, classes: int, world_size: int, *, begun: bool, on_host: bool = False) -> str:
    """The settings that reduce the memory, and by how much: the most effective first, and last one that makes it
    another run. `begun` as for `out_of_memory`; with `on_host` it is the memory of a machine whose ranks have no GPUs.
    """

    def needed(changed: TrainStage, ranks: int) -> int:
        memory = estimate_memory(changed, classes, ranks, on_cpu=on_host)
        return memory.host * (ranks // stage.resources.nodes) if on_host else memory.device

    now = needed(stage, world_size)
    found: list[tuple[int, str]] = []

    def consider(change: str, ranks: int = world_size, **settings: Any) -> None:
        found.append((now - needed(stage.model_copy(update=settings), ranks), change))

    for policy in ("mbconv", "every_block"):
        consider(f"activation_checkpointing={policy}", activation_checkpointing=policy)
    for zero_stage in range(stage.zero_stage + 1, 3 if stage.compile or stage.fused_depthwise else 4):
        consider(f"zero_stage={zero_stage}", zero_stage=zero_stage)
    if on_host and world_size % 2 == 0 and world_size // 2 % stage.resources.nodes == 0:
        consider(f"resources.ranks={world_size // 2}", world_size // 2)
    elif stage.zero_stage and not on_host and stage.batch.micro_batches % (2 * world_size) == 0:
        consider(f"resources.ranks={2 * world_size}", 2 * world_size)
    found.sort(key=lambda remedy: -remedy[0])
    if not begun and stage.batch.micro_size % 2 == 0:
        half = stage.batch.micro_size // 2
        change = f"batch.micro_size={half} (another run, as BatchNorm sees it: remove the run folder with it)"
        consider(change, batch=stage.batch.model_copy(update={"micro_size": half}))
    advice = [f"{change}, {_gigabytes(saved)} less" for saved, change in found if saved > 0.01 * now]
    return (
        f"Change settings, most effective first: {'; '.join(advice)}"
        if advice
        else f"Use {'machines' if on_host else 'GPUs'} with more memory"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
