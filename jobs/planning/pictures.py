"""The pictures of a plan: memory, the timeline of a step, and scaling."""

from PIL import Image

from pipeline.planner.alternatives import Alternative
from pipeline.planner.hardware import Cluster
from pipeline.planner.pictures.heading import Subject
from pipeline.planner.pictures.memory_bars import MemoryBar, memory_picture
from pipeline.planner.pictures.scaling_curve import ScalingPoint, scaling_picture
from pipeline.planner.pictures.step_timeline import SpanKind, StepTimeline, TimelineSpan, timeline_picture
from pipeline.planner.stage_plan import StagePlan
from pipeline.planner.step_estimate import MeasuredSpeed, StepEstimate, estimate_step


def plan_pictures(plan: StagePlan, measured: MeasuredSpeed | None = None) -> dict[str, Image.Image]:
    """The pictures by their names, which are those of their files."""
    return {
        "memory": _memory(plan),
        "timeline": timeline_picture(_subject(plan), step_timeline(plan.step, _reading(plan))),
        "scaling": scaling_picture(_subject(plan), scaling_points(plan, measured)),
    }


def _subject(plan: StagePlan) -> Subject:
    stage, cluster = plan.stage, plan.cluster
    details = (
        f"{stage.model.name} with {plan.parameters / 1e6:,.0f} million parameters at {stage.resolution} pixels, "
        f"{stage.precision}, micro-batches of {stage.batch.micro_size}, {stage.batch.global_size:,} images in a step; "
        f"{cluster.gpus} GPUs, {cluster.gpus_per_node} in a node, {cluster.link.value / 1e9:g} GB/s between them and "
        f"{cluster.network.value / 1e9:g} GB/s of network for each."
    )
    return Subject(plan.name, f"{cluster.gpu.kind} {cluster.memory / 1e9:g} GB", plan.is_measured, details)


def _memory(plan: StagePlan) -> Image.Image:
    recommended = plan.recommended.settings
    chosen = (recommended["zero_stage"], recommended["activation_checkpointing"])
    size = plan.memory.size
    bars = [memory_bar(one, (one.zero_stage, one.policy) == chosen) for one in plan.alternatives]
    return memory_picture(_subject(plan), bars, size, size)


def memory_bar(one: Alternative, recommended: bool) -> MemoryBar:
    """The bar of a configuration, with what CUDA and the allocator are assumed to take: it fits as the table has it."""
    step = one.memory.step
    return MemoryBar(
        name=one.name,
        weights=step.weights,
        gradients=step.gradients,
        optimizer_state=step.optimizer_state,
        moving_average=step.moving_average,
        buffers=step.buffers,
        buckets=step.buckets,
        activations=step.working,
        reserve=one.memory.reserve,
        recommended=recommended,
        in_recipe=one.is_own,
    )


def _reading(plan: StagePlan) -> float:
    """Seconds in which the reader threads of a rank read a micro-batch."""
    images = plan.stage.batch.micro_size / (plan.loader.images_per_second.value / plan.cluster.gpus_per_node)
    return images * plan.loader.cores_per_gpu.value / plan.stage.data.workers


def step_timeline(step: StepEstimate, reading: float) -> StepTimeline:
    """The step as it is estimated: micro-batches one after the other, sums that nothing hides, the optimizer, gathers.

    Hidden communication is drawn at the end of the backwards that it hides behind. Where the host is slower than the
    GPU, each of them is drawn at its own speed, and the step ends with the host. Reading a micro-batch takes `reading`
    seconds; where that is longer than computing it, which the step does not count, its name says so.
    """
    spans: list[TimelineSpan] = []
    now = 0.0
    busy = step.forward.value + step.recomputation.value + step.backward.value
    each = step.issuing.value / step.micro_batches
    for number in range(step.micro_batches):
        began = now
        parts: tuple[tuple[SpanKind, float], ...] = (
            ("forward", step.forward.value),
            ("recomputation", step.recomputation.value),
            ("backward", step.backward.value),
        )
        for kind, seconds in parts:
            if seconds:
                spans.append(_span(kind, now, seconds, number))
            now += seconds
        if hidden := _hidden(step, number):
            spans.append(_span("hidden communication", max(began, now - hidden), min(hidden, busy), number))
        spans.append(_span("host", number * max(each, busy), each, number))
        late = f"reads for {1e3 * reading:,.0f} ms, longer than it computes" if reading > busy else "read and decode"
        spans.append(_span("data", began, min(reading, busy), number, late))
    gathering = sum(
        seconds.value
        for one, seconds in zip(step.collectives, step.communication.each, strict=True)
        if one.kind == "all_gather" and not one.during_backward
    )
    summing = step.communication.exposed.value - gathering
    if summing > 0:
        spans.append(_span("exposed communication", now, summing))
        now += summing
    spans.append(_span("optimizer", now, step.optimizer.value))
    now += step.optimizer.value
    if gathering:
        spans.append(_span("exposed communication", now, gathering))
    whole = step.seconds
    least, most = (None, None) if whole.is_exact else (1e3 * whole.least, 1e3 * whole.most)
    return StepTimeline(1e3 * whole.value, spans, step.micro_batches, least, most)


def _hidden(step: StepEstimate, number: int) -> float:
    """Seconds of communication that hide behind micro-batch `number`: what is sent once, behind the last one."""
    hidden = step.communication.total.value - step.communication.exposed.value
    if all(one.times == 1 for one in step.collectives if one.during_backward):
        return hidden if number == step.micro_batches - 1 else 0.0
    return hidden / step.micro_batches


def _span(kind: SpanKind, start: float, seconds: float, micro_batch: int | None = None, name: str = "") -> TimelineSpan:
    return TimelineSpan(kind, 1e3 * start, 1e3 * (start + seconds), micro_batch, name)


def scaling_points(plan: StagePlan, measured: MeasuredSpeed | None = None) -> list[ScalingPoint]:
    """From one node, or one GPU, to as many GPUs as there are micro-batches in a step, and the plan's own number."""
    batches, cluster = plan.stage.batch.micro_batches, plan.cluster
    numbers = {cluster.gpus}
    number = min(cluster.gpus_per_node, cluster.gpus)
    while number <= batches:
        if batches % number == 0:
            numbers.add(number)
        number *= 2
    return [_point(plan, cluster.with_gpus(gpus), measured) for gpus in sorted(numbers)]


def _point(plan: StagePlan, cluster: Cluster, measured: MeasuredSpeed | None) -> ScalingPoint:
    step = estimate_step(plan.stage, plan.dataset.classes, cluster, measured)
    speed = step.images_per_second
    share = step.communication.exposed.value / step.seconds.value
    return ScalingPoint(cluster.gpus, speed.value, share, speed.least, speed.most)
