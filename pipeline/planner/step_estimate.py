"""How long a training step takes on a cluster: computation, optimizer, what the host issues, and communication."""

from dataclasses import dataclass
from functools import cache

from models.complexity import count_costs, count_parameters
from models.variants import Variant
from pipeline.planner.collectives import (
    PERSISTENT,
    Collective,
    CommunicationTime,
    collectives,
    communication_seconds,
)
from pipeline.planner.hardware import Cluster, figure_range, find_cluster
from pipeline.planner.pricing import GpuModel, seconds_by_kind, seconds_range, total_seconds
from pipeline.planner.ranges import Range
from pipeline.planner.trace.training_trace import (
    StepTrace,
    Traced,
    Workload,
    build_on_meta,
    trace_training,
    workload,
)
from pipeline.recipe.schema import TrainStage


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """One optimizer step; times in seconds, on each GPU."""

    micro_batches: int
    """Of each GPU."""
    forward: Range
    """Of one micro-batch, as are `recomputation` and `backward`."""
    recomputation: Range
    backward: Range
    optimizer: Range
    """Once in a step."""
    issuing: Range
    """What the host takes to issue the kernels of the step, and with ZeRO 3 to gather and release each weight."""
    kernels: int
    """Of the step."""
    kinds: dict[str, float]
    """Seconds of all micro-batches by the kind of operation, the longest first."""
    collectives: tuple[Collective, ...]
    communication: CommunicationTime
    images: int
    """Of a step, over all GPUs."""
    model_flops: float
    """Of a step on one GPU, without recomputation, as MFU has it."""
    executed_flops: float
    """The same with recomputation, and as the kernels count them."""
    peak: float
    """FLOP/s of a GPU in half precision."""
    measured: bool
    """Whether the computation was measured on such a GPU."""

    @property
    def computing(self) -> Range:
        """Of all micro-batches and the optimizer, or of the host where it is slower."""
        micro_batches = (self.forward + self.recomputation + self.backward) * self.micro_batches
        return (micro_batches + self.optimizer).at_least(self.issuing)

    @property
    def seconds(self) -> Range:
        """The whole step, if the data is there in time."""
        return self.computing + self.communication.exposed

    @property
    def images_per_second(self) -> Range:
        """Of all GPUs."""
        return self.seconds.dividing(self.images)

    @property
    def utilization(self) -> Range:
        """MFU: the share of the GPU's peak, 0 to 1."""
        return self.seconds.dividing(self.model_flops / self.peak)


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """How a measured step compares with the estimate for it."""

    factor: float
    """Measured time over estimated."""
    variation: float
    """The range of other settings than those measured, as a share of the time; 0 for those."""
    origin: str


def estimate_step(
    stage: TrainStage, classes: int, cluster: Cluster, measured: MeasuredSpeed | None = None
) -> StepEstimate:
    """A step of `stage` on all GPUs of `cluster`, whose number replaces that of the recipe's ranks.

    Args:
        stage: whose micro-batches the GPUs share evenly.
        classes: of its data.
        cluster: where it runs.
        measured: of such a GPU; None to rely on efficiencies alone.
    """
    rounds = stage.batch.micro_batches // cluster.gpus
    shares = cluster.gpus if stage.zero_stage else 1
    priced = _priced(workload(stage, classes), shares, stage.ema_decay is not None, cluster.gpu)
    forward, recomputation, backward, optimizer = (_measured(part, measured) for part in priced.parts)
    parameters = _parameters(stage.model.variant, stage.resolution, classes)
    found = (
        collectives(parameters, stage.precision, stage.zero_stage, rounds, stage.communication, priced.persistent)
        if cluster.gpus > 1
        else ()
    )
    hiding = backward * (rounds if stage.zero_stage >= 2 else 1)
    kernels = rounds * priced.kernels + priced.optimizer_kernels
    # A measured step was as long as its host took, if that was the slower one.
    issuing = _measured(figure_range(cluster.law.host_launch) * kernels, measured)
    if stage.zero_stage == 3 and cluster.gpus > 1:
        issuing = issuing + figure_range(cluster.law.zero3_tensor) * (rounds * priced.tensors)
    images = stage.batch.micro_size * rounds
    return StepEstimate(
        micro_batches=rounds,
        forward=forward,
        recomputation=recomputation,
        backward=backward,
        optimizer=optimizer,
        issuing=issuing,
        kernels=kernels,
        kinds={kind: rounds * seconds for kind, seconds in priced.kinds.items()},
        collectives=found,
        communication=communication_seconds(found, cluster, hiding),
        images=stage.batch.global_size,
        model_flops=6.0 * images * _multiply_adds(stage.model.variant, stage.resolution, classes),
        executed_flops=float(rounds * priced.flops),
        peak=cluster.gpu.peak,
        measured=measured is not None,
    )


def computing_speed(stage: TrainStage, classes: int, gpu: str) -> Range:
    """Images per second that each GPU of kind `gpu` trains on while neither data nor other ranks hold it up.

    Raises:
        ConfigError: the kind is not known.
    """
    ranks = stage.resources.ranks
    step = estimate_step(stage, classes, find_cluster(gpu, ranks, ranks))
    return step.computing.dividing(step.images / ranks)


@dataclass(frozen=True, slots=True)
class _Priced:
    """The parts of a step on one kind of GPU, by its efficiencies."""

    parts: tuple[Range, Range, Range, Range]
    """Forward, recomputation and backward of a micro-batch, and the optimizer."""
    kinds: dict[str, float]
    kernels: int
    """Of a micro-batch."""
    optimizer_kernels: int
    flops: int
    """Of a micro-batch."""
    tensors: int
    """Parameters of the model, each of them one."""
    persistent: int
    """Elements of those that ZeRO 3 keeps gathered."""


@cache
def _priced(subject: Workload, shares: int, moving_average: bool, gpu: GpuModel) -> _Priced:
    trace = _trace(subject, shares, moving_average)
    forward, recomputation, backward, optimizer = (
        _seconds(part, gpu) for part in (trace.forward, trace.recomputation, trace.backward, trace.optimizer)
    )
    micro_batch = trace.micro_batch
    sizes = [parameter.numel() for parameter in build_on_meta(subject).parameters()]
    return _Priced(
        parts=(forward, recomputation, backward, optimizer),
        kinds=seconds_by_kind(micro_batch.operations, gpu, compiled=micro_batch.compiled),
        kernels=micro_batch.kernels,
        optimizer_kernels=trace.optimizer.kernels,
        flops=micro_batch.flops,
        tensors=len(sizes),
        persistent=sum(size for size in sizes if size <= PERSISTENT),
    )


def _seconds(part: Traced, gpu: GpuModel) -> Range:
    operations = list(part.operations)
    value = total_seconds(operations, gpu, compiled=part.compiled)
    return Range(value, *seconds_range(operations, gpu, compiled=part.compiled))


def _measured(part: Range, measured: MeasuredSpeed | None) -> Range:
    if measured is None:
        return part
    value = part.value * measured.factor
    return Range(value, value * (1 - measured.variation), value * (1 + measured.variation))


@cache
def _trace(subject: Workload, shares: int, moving_average: bool) -> StepTrace:
    return trace_training(subject, shares=shares, moving_average=moving_average)


@cache
def _parameters(variant: Variant, image_size: int, classes: int) -> int:
    return count_parameters(variant, image_size, classes)


@cache
def _multiply_adds(variant: Variant, image_size: int, classes: int) -> int:
    return sum(cost.multiply_adds for cost in count_costs(variant, image_size, classes))


def parameters_of(stage: TrainStage, classes: int) -> int:
    """Parameters of the stage's model."""
    return _parameters(stage.model.variant, stage.resolution, classes)


def multiply_adds_of(stage: TrainStage, classes: int) -> int:
    """Multiply-adds of one forward of one image."""
    return _multiply_adds(stage.model.variant, stage.resolution, classes)
