"""An estimate of the memory that training needs, by kind, on a GPU or a host; and what to change when it is full."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from data.text.counted import counted
from models.complexity import count_parameters, count_training_cost
from pipeline.errors import RunFailed
from pipeline.host import this_host
from pipeline.plan import TrainPlan
from pipeline.recipe.schema import Precision, TrainStage, sums_after_backward
from pipeline.recipe.sections import CommunicationSettings

# Elements: DeepSpeed's stage3_max_live_parameters up to which ZeRO 3 leaves weights gathered.
_GATHERED = 1_000_000_000
_PROCESS = 450_000_000
"""Bytes of a rank on the host before it has a model: Python, torch for CPUs and DeepSpeed, as measured on Linux."""
_ALLOCATION_FAILURES = ("DefaultCPUAllocator", "Cannot allocate memory", "not enough memory: you tried to allocate")
"""In the RuntimeErrors that torch raises when the host's memory is full."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank at the end of a backward, when most is in use."""

    weights: int
    gradients: int
    optimizer_state: int
    """Float32 master weights, unless they are the weights themselves, and AdamW's two moments."""
    moving_average: int
    buckets: int
    """Buffers in which gradients are reduced during the backward, and weights that ZeRO 3 has gathered."""
    activations: int
    """Of a micro-batch; somewhat more under bf16_autocast, where norms compute in float32."""
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


def estimate_memory(stage: TrainStage, classes: int, world_size: int) -> MemoryEstimate:
    """The memory of each of `world_size` ranks that train `stage`, from counted parameters and activations."""
    variant = stage.model.variant
    parameters = count_parameters(variant, stage.resolution, classes)
    weights, gradients, state = bytes_of_state(parameters, stage.precision, stage.zero_stage, world_size)
    share = -(-parameters // world_size)
    average = 4 if stage.ema_decay is not None else 0
    cost = count_training_cost(variant, stage.resolution, classes, stage.activation_checkpointing)
    per_image = cost.activation_bytes * (2 if stage.precision == "fp32" else 1)  # counted in bf16
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer_state=state,
        moving_average=average * (share if stage.zero_stage else parameters),
        buckets=bucket_bytes(parameters, stage.precision, stage.zero_stage, world_size, stage.communication),
        activations=stage.batch.micro_size * per_image,
        staging=(12 + average) * share,
    )


def bytes_of_state(parameters: int, precision: Precision, zero_stage: int, world_size: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state on each rank; with N ranks, for each parameter

    | ZeRO | fp32, bf16_autocast | bf16 |
    |---|---|---|
    | 0 | 4 + 4 + 8 | |
    | 1 | 4 + 4 + 12/N | 2 + 4 + 12/N |
    | 2 | 4 + 4/N + 12/N | 2 + 4/N + 12/N |
    | 3 | 4/N + 4/N + 12/N | 2/N + 4/N + 12/N |
    """
    share = -(-parameters // world_size)
    if zero_stage == 0:
        return 4 * parameters, 4 * parameters, 8 * parameters
    weight = 2 if precision == "bf16" else 4
    weights = weight * (share if zero_stage == 3 else parameters)
    gradients = 4 * (share if zero_stage >= 2 else parameters)
    return weights, gradients, 12 * share


def bucket_bytes(
    parameters: int, precision: Precision, zero_stage: int, world_size: int, communication: CommunicationSettings
) -> int:
    """Bytes that communication needs on each rank, beside weights and gradients."""
    if sums_after_backward(precision, zero_stage):
        return 0
    size = communication.bucket_size
    # One is filled while the other is summed. With ZeRO 3 there is one in any case.
    bucket = (2 if communication.overlap and zero_stage < 3 else 1) * 4 * size
    if zero_stage == 2 and precision == "bf16":
        # Gradients are collected in a bucket of bf16, which is copied to be summed in float32.
        bucket = bucket // 2 + (4 * min(parameters, size) if communication.gradients == "fp32" else 0)
    gathered = min(parameters, _GATHERED) if zero_stage == 3 and world_size > 1 else 0
    return bucket + (2 if precision == "bf16" else 4) * gathered


def checkpoint_bytes(stage: TrainStage, parameters: int) -> int:
    """Bytes of a checkpoint: master weight, AdamW's two moments and the moving average of each parameter.

    Buffers, a thousandth of that, are not counted.
    """
    return parameters * (12 + (4 if stage.ema_decay is not None else 0))


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
    memory, ranks = estimate_memory(stage, classes, stage.resources.ranks), stage.resources.ranks_per_node
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
        memory = estimate_memory(changed, classes, ranks)
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
