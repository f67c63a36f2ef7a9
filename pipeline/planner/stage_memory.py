"""Whether a stage fits into the memory of a GPU, and the largest micro-batch that does."""

from dataclasses import dataclass
from typing import Any

from pipeline.planner.hardware import Cluster, bundled_hardware, figure_range
from pipeline.planner.memory import StepMemory, step_memory
from pipeline.planner.ranges import Range
from pipeline.planner.trace.training_trace import workload
from pipeline.recipe.schema import TrainStage


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """The memory of a GPU that trains a stage, in bytes."""

    step: StepMemory
    reserve: int
    """What CUDA, its libraries and the allocator take beyond what is counted: an assumption."""
    most_reserve: int
    """The upper end of what is assumed."""
    size: int
    """Of the GPU."""

    @property
    def needed(self) -> int:
        """With the reserve."""
        return self.step.total + self.reserve

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.needed <= self.size

    @property
    def is_safe(self) -> bool:
        """Whether it fits with the upper end of the reserve."""
        return self.step.total + self.most_reserve <= self.size

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes of each kind that is not nothing, the reserve last."""
        step = self.step
        found = {
            "weights": step.weights,
            "gradients": step.gradients,
            "optimizer state": step.optimizer_state,
            "moving average": step.moving_average,
            "BatchNorm's statistics": step.buffers,
            "communication buckets": step.buckets,
            "activations and temporary": step.working,
            "reserve": self.reserve,
        }
        return {kind: size for kind, size in found.items() if size}


def gpu_memory(stage: TrainStage, classes: int, cluster: Cluster) -> GpuMemory:
    """The memory of each GPU of `cluster`, whose number replaces that of the recipe's ranks."""
    step = step_memory(
        workload(stage, classes),
        stage.zero_stage,
        cluster.gpus,
        moving_average=stage.ema_decay is not None,
        rounds=max(1, stage.batch.micro_batches // cluster.gpus),
        communication=stage.communication,
    )
    reserve = gpu_reserve(step.working)
    return GpuMemory(step, round(reserve.value), round(reserve.most), round(cluster.memory))


def gpu_reserve(working: int) -> Range:
    """Bytes that CUDA, its libraries and the allocator take beyond what is counted; `working` is the peak of a
    micro-batch, of which the allocator holds a share more."""
    law = bundled_hardware().law
    return figure_range(law.context) + figure_range(law.fragmentation) * working


def largest_micro_batch(stage: TrainStage, classes: int, cluster: Cluster) -> int | None:
    """The largest micro-batch that fits and that the GPUs can share the global batch in; None if not even one image.

    Searched among the divisors of a GPU's share of the global batch, by halves of their list, as more images never need
    less.
    """
    share = stage.batch.global_size // cluster.gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]

    def fits(number: int) -> bool:
        return gpu_memory(with_micro_batch(stage, sizes[number]), classes, cluster).fits

    least, most = 0, len(sizes)  # sizes[:least] fit, sizes[most:] do not
    while least < most:
        middle = most - 1 if least == 0 and most == len(sizes) else (least + most) // 2  # often all of them fit
        if fits(middle):
            least = middle + 1
        else:
            most = middle
    return sizes[least - 1] if least else None


def with_micro_batch(stage: TrainStage, micro_size: int) -> TrainStage:
    """The stage with other micro-batches of the same global batch."""
    return with_settings(stage, batch=stage.batch.model_copy(update={"micro_size": micro_size}))


def with_settings(stage: TrainStage, **settings: Any) -> TrainStage:
    """The stage with other settings, which are not checked."""
    return stage.model_copy(update=settings)
