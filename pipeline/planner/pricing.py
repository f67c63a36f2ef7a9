"""The time of an operation on a GPU: a roofline with measured efficiencies.

An operation takes as long as the slowest of three: its arithmetic at the GPU's peak, its bytes at the bandwidth of the
GPU's memory, each times an efficiency, and the launch of a kernel. `efficiencies.yaml` has the efficiencies, each with
its origin.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from pipeline.errors import ConfigError
from pipeline.planner.figures import Figure, StrictModel, bundled_figures
from pipeline.planner.trace.operations import Operation, Product, Scores, Taps
from pipeline.ranks.gpus import FLOAT32_PEAKS, PEAKS, known_name, memory_bandwidth


class Law(StrictModel):
    """What holds for all GPUs."""

    tile_columns: Figure
    """Of a tile of a matrix product: the columns of the result are padded to a multiple."""
    tile_depth: Figure
    """Of one instruction of a tensor core: rows of the second matrix are padded to a multiple."""
    attention_tile: Figure
    """Queries and keys are padded to a multiple."""
    flash: Figure
    """Share of the speed of matrix products that the products of flash attention reach."""
    biased: Figure
    """Speed of the memory-efficient kernel, which takes a bias, as a share of that of flash attention."""
    softmax: Figure
    """Float32 operations for each score."""
    depthwise_taps: Figure
    """Share of the float32 peak."""
    depthwise_memory: Figure
    """Share of the speed at which plain passes move bytes."""
    strided_memory: Figure
    """The same for copies and additions of tensors in different orders."""
    float32_matmul: Figure
    """Share of the float32 peak of matrix products without TF32."""
    launch: Figure
    """Seconds that a kernel takes at least."""
    error: Figure
    """Factor between a predicted time and a measured one of models that were not fitted."""


class GpuEfficiency(StrictModel):
    """What holds for one kind of GPU."""

    matmul: Figure
    """Share of the peak that large matrix products in half precision reach."""
    memory: Figure
    """Share of the bandwidth at which large tensors are read and written."""
    eager: Figure
    """Factor on the time of eager kernels."""


class EfficiencyFile(StrictModel):
    """`efficiencies.yaml`."""

    version: int
    law: Law
    gpus: dict[str, GpuEfficiency]
    other: GpuEfficiency
    """For GPUs that are not in `gpus`."""


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A kind of GPU by its data sheet and its efficiencies."""

    kind: str
    """The key in `pipeline.ranks.gpus.PEAKS`."""
    peak: float
    """Half-precision operations per second with sums in float32."""
    float32_peak: float
    bandwidth: float
    """Bytes per second."""
    law: Law
    efficiency: GpuEfficiency

    @property
    def measured(self) -> bool:
        """Whether measurements on this kind stand behind its efficiencies, so that they have no range."""
        efficiency = self.efficiency
        return efficiency.matmul.known and efficiency.memory.known and efficiency.eager.known

    @property
    def fastest(self) -> "GpuModel":
        """With the efficiencies at the fast end of their ranges."""
        return self._moved("most", "least")

    @property
    def slowest(self) -> "GpuModel":
        """With the efficiencies at the slow end of their ranges."""
        return self._moved("least", "most")

    def _moved(self, share: str, factor: str) -> "GpuModel":
        def at(figure: Figure, end: str) -> Figure:
            value = getattr(figure, end)
            return figure if value is None else figure.model_copy(update={"value": value})

        old = self.efficiency
        ends = {"matmul": at(old.matmul, share), "memory": at(old.memory, share), "eager": at(old.eager, factor)}
        return replace(self, efficiency=old.model_copy(update=ends))


@cache
def bundled_efficiencies() -> EfficiencyFile:
    """The file that comes with the program."""
    return bundled_figures(EfficiencyFile, "efficiencies.yaml")


def gpu_model(name: str, content: EfficiencyFile | None = None) -> GpuModel:
    """The model of a GPU by its key in `PEAKS`, such as `RTX 4090`, or by the name that torch has for it.

    Raises:
        ConfigError: it is not in the table.
    """
    content = content or bundled_efficiencies()
    kind, bandwidth = known_name(name), memory_bandwidth(name)
    if kind is None or bandwidth is None:
        raise ConfigError(f"GPU {name}: not in the table; use one of {', '.join(PEAKS)}")
    efficiency = content.gpus.get(kind, content.other)
    return GpuModel(kind, PEAKS[kind], FLOAT32_PEAKS[kind], bandwidth, content.law, efficiency)


def seconds(operation: Operation, gpu: GpuModel) -> float:
    """How long `operation` takes as one kernel, without a factor for eager kernels."""
    law, work = gpu.law, operation.work
    speed = gpu.bandwidth * gpu.efficiency.memory.value
    if operation.strided:
        speed *= law.strided_memory.value
    moving = operation.bytes / speed
    if isinstance(work, Product):
        time = max(_product_seconds(work, operation.in_float32, gpu), moving)
        if operation.kind == "convolution" and not operation.channels_last:
            # cuDNN's kernels for tensor cores are channels-last: both tensors are converted, in a pass each.
            time += moving
    elif isinstance(work, Scores):
        time = max(_attention_seconds(work, operation.in_float32, gpu), moving)
    elif isinstance(work, Taps):
        taps = work.flops / (gpu.float32_peak * law.depthwise_taps.value)
        time = max(taps, moving / law.depthwise_memory.value)
    else:
        time = moving
    return max(time, law.launch.value)


def total_seconds(operations: Iterable[Operation], gpu: GpuModel, *, compiled: bool) -> float:
    """How long `operations` take one after the other."""
    return sum(seconds_by_kind(operations, gpu, compiled=compiled).values())


def seconds_range(operations: Sequence[Operation], gpu: GpuModel, *, compiled: bool) -> tuple[float, float]:
    """The least and the most that `operations` may take, by the ranges of the efficiencies and the law's error."""
    error = gpu.law.error
    least = total_seconds(operations, gpu.fastest, compiled=compiled) * (error.least or 1.0)
    return least, total_seconds(operations, gpu.slowest, compiled=compiled) * (error.most or 1.0)


def seconds_by_kind(operations: Iterable[Operation], gpu: GpuModel, *, compiled: bool) -> dict[str, float]:
    """The same for each kind of operation, the longest first."""
    factor = 1.0 if compiled else gpu.efficiency.eager.value
    found: dict[str, float] = {}
    for operation in operations:
        found[operation.kind] = found.get(operation.kind, 0.0) + factor * seconds(operation, gpu)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _product_seconds(work: Product, in_float32: bool, gpu: GpuModel) -> float:
    if in_float32:
        return work.flops / (gpu.float32_peak * gpu.law.float32_matmul.value)
    columns = _padded(work.n, gpu.law.tile_columns)
    depth = _padded(work.k, gpu.law.tile_depth)
    return 2 * work.batch * work.m * columns * depth / (gpu.peak * gpu.efficiency.matmul.value)


def _attention_seconds(work: Scores, in_float32: bool, gpu: GpuModel) -> float:
    law = gpu.law
    scores = work.heads * _padded(work.queries, law.attention_tile) * _padded(work.keys, law.attention_tile)
    softmax = scores * law.softmax.value / gpu.float32_peak
    operations = 2 * work.products * scores * work.head_size
    if in_float32:
        return operations / (gpu.float32_peak * law.float32_matmul.value * law.biased.value) + softmax
    products = operations / (gpu.peak * gpu.efficiency.matmul.value * law.flash.value)
    return (products + softmax) / (law.biased.value if work.biased else 1.0)


def _padded(size: int, tile: Figure) -> int:
    """`size` as a multiple of the tile, or of its half, quarter ... where that is enough for all of it."""
    unit = int(tile.value)
    while unit >= 2 * size and unit > 8:
        unit //= 2
    return math.ceil(size / unit) * unit
