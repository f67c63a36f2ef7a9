"""The operations of a training step and of a forward in evaluation of a CoAtNet, as a GPU runs them.

Each distinct block is traced once and counted as often as it occurs, so that the largest variants take seconds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.coatnet import CoAtNet
from models.drop import Kept
from models.options import CheckpointingPolicy
from models.variants import Variant
from pipeline.planner.trace.fusion import fuse
from pipeline.planner.trace.gpu_functions import GpuFunctions
from pipeline.planner.trace.operations import Access, Operation
from pipeline.planner.trace.recording import Recording
from pipeline.recipe.schema import Precision, TrainStage


@dataclass(frozen=True, slots=True)
class Workload:
    """What is traced."""

    variant: Variant
    image_size: int
    """Pixels of a side."""
    classes: int
    micro_batch: int
    """Images."""
    precision: Precision = "bf16"
    policy: CheckpointingPolicy = "none"
    drop_path_rate: float = 0.0
    compiled: bool = False
    """Whether stem and blocks are compiled, each as one graph; the head is eager."""


def workload(stage: TrainStage, classes: int) -> Workload:
    """What of a stage decides the operations of a micro-batch.

    Fused depthwise convolutions are not traced: they count as the operations that they replace.
    """
    return Workload(
        variant=stage.model.variant,
        image_size=stage.resolution,
        classes=classes,
        micro_batch=stage.batch.micro_size,
        precision=stage.precision,
        policy=stage.activation_checkpointing,
        drop_path_rate=stage.model.drop_path_rate,
        compiled=stage.compile,
    )


@dataclass(frozen=True, slots=True)
class Traced:
    """Kernels, and how often each of them runs."""

    counts: tuple[tuple[Operation, int], ...]
    compiled: bool

    @property
    def operations(self) -> Iterator[Operation]:
        """Every run of a kernel."""
        for operation, count in self.counts:
            yield from [operation] * count

    @property
    def flops(self) -> int:
        """Of matrix products, attention and convolutions, recomputed ones included."""
        return sum(count * operation.flops for operation, count in self.counts)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(count * operation.bytes for operation, count in self.counts)

    @property
    def kernels(self) -> int:
        """Their number."""
        return sum(count for _, count in self.counts)


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One training step on one rank: each of its micro-batches, and once at its end what `optimizer` has."""

    forward: Traced
    recomputation: Traced
    """Forwards of the blocks whose activations were not kept."""
    backward: Traced
    """With the addition of the gradients to those of earlier micro-batches."""
    optimizer: Traced
    """AdamW on the rank's share, casts of weights, and the moving average of the weights."""

    @property
    def micro_batch(self) -> Traced:
        """Forward, recomputation and backward."""
        parts = (self.forward, self.recomputation, self.backward)
        return Traced(tuple(count for part in parts for count in part.counts), self.forward.compiled)


def trace_evaluation(subject: Workload) -> Traced:
    """A forward of one micro-batch without gradients."""
    model = build_on_meta(subject).eval()
    counts: Counter[Operation] = Counter()
    for part in _parts(model, subject):
        with torch.no_grad():
            forward = _record(part, subject, None)[0]
        part_compiled = subject.compiled and not part.is_head
        counts.update(_without_identity(fuse(forward) if part_compiled else forward, part.count))
    return Traced(tuple(counts.items()), subject.compiled)


def trace_training(subject: Workload, *, shares: int = 1, moving_average: bool = False) -> StepTrace:
    """A training step, whose optimizer state is divided among `shares` ranks."""
    model = build_on_meta(subject).train()
    first: Counter[Operation] = Counter()
    repeated: Counter[Operation] = Counter()
    last: Counter[Operation] = Counter()
    casts: Counter[Operation] = Counter()
    for part in _parts(model, subject):
        forward, backward, weight_casts = _record(part, subject, True)
        if subject.compiled and not part.is_head:
            forward, again, backward = _compiled(forward, backward, recomputed=part.recomputed)
        else:
            again = forward if part.recomputed else []
        first.update(_without_identity(forward, part.count))
        repeated.update(_without_identity(again, part.count))
        last.update(_without_identity(backward, part.count))
        casts.update(_without_identity(weight_casts, part.count))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last[_accumulation(parameters, subject.precision)] += 1
    optimizer = [_adamw(parameters, subject.precision, shares)]
    if moving_average:
        share = -(-parameters // shares)
        optimizer.append(Operation("elementwise", "moving_average", _sizes(8 * share), _sizes(4 * share)))
    casts.update(optimizer)
    return StepTrace(*(Traced(tuple(part.items()), subject.compiled) for part in (first, repeated, last, casts)))


@dataclass(frozen=True, slots=True)
class _Part:
    """Stem, a block, or the head, with what it gets, and how many of the model are like it."""

    module: nn.Module
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    """Images that take part in each branch; none if stochastic depth drops nothing."""
    recomputed: bool
    is_stem: bool
    is_head: bool
    count: int


def build_on_meta(subject: Workload) -> CoAtNet:
    """The model without memory, in the dtype of its weights, with its activation checkpointing."""
    size = (subject.image_size, subject.image_size)
    with torch.device("meta"):
        model = CoAtNet(
            subject.variant, num_classes=subject.classes, image_size=size, drop_path_rate=subject.drop_path_rate
        )
    if subject.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model.set_grad_checkpointing(policy=subject.policy)
    return model


def _parts(model: CoAtNet, subject: Workload) -> list[_Part]:
    variant, images = subject.variant, subject.micro_batch
    side, width = subject.image_size // variant.stem_stride, variant.stem_width
    found = [_Part(model.stem, (subject.image_size, 3), (), model.recomputed[0], True, False, 1)]
    places = (block for stage in variant.stages for block in [(stage, n == 0) for n in range(stage.depth)])
    for number, (stage, is_first) in enumerate(places):
        rates = model.drop_rates[number] if model.training else ()
        kept = tuple(max(1, round(images * (1 - rate))) for rate in rates)
        again = model.recomputed[number + 1]
        found.append(_Part(model.blocks[number], (side, width), kept, again, False, False, 1))
        side, width = side // (stage.stride if is_first else 1), stage.width
    found.append(_Part(model.head, (side, width), (), False, False, True, 1))
    return _distinct(found)


def _distinct(parts: Iterable[_Part]) -> list[_Part]:
    counts: Counter[object] = Counter()
    first: dict[object, _Part] = {}
    for part in parts:
        shapes = tuple((name, tuple(p.shape)) for name, p in part.module.named_parameters())
        like = (type(part.module), shapes, part.shape, part.kept, part.recomputed, getattr(part.module, "stride", 1))
        first.setdefault(like, part)
        counts[like] += 1
    return [
        _Part(p.module, p.shape, p.kept, p.recomputed, p.is_stem, p.is_head, counts[like]) for like, p in first.items()
    ]


def _record(
    part: _Part, subject: Workload, backward: bool | None
) -> tuple[list[Operation], list[Operation], list[Operation]]:
    """The operations of the forward, those of the backward, and the casts of weights under autocast."""
    dtype = torch.bfloat16 if subject.precision == "bf16" else torch.float32
    side, width = part.shape
    x = torch.empty(subject.micro_batch, side, side, width, dtype=dtype, device="meta")
    x.requires_grad_(bool(backward) and not part.is_stem)
    kept = tuple(_kept(count, subject.micro_batch) for count in part.kept) or None
    arguments = () if part.is_stem or part.is_head else (kept,)
    autocast = torch.bfloat16 if subject.precision == "bf16_autocast" else None
    recording = Recording()
    with recording, GpuFunctions(autocast):
        weights = {recording.value(parameter) for parameter in part.module.parameters()}
        y = cast(Tensor, part.module(x, *arguments))
        forward = recording.operations
        if backward:
            recording.operations = []
            gradient = torch.empty_like(y)
            torch.autograd.backward(y, gradient)
            part.module.zero_grad(set_to_none=True)
    # A stage casts a weight once for all micro-batches of a step.
    weight_casts = [o for o in forward if autocast and o.is_cast and o.reads[0].value in weights]
    forward = [o for o in forward if o not in weight_casts]
    return forward, recording.operations if backward else [], weight_casts if backward else []


def _kept(count: int, images: int) -> Kept:
    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Kept(
        tensor((count,), torch.int64), tensor((images,), torch.int64), tensor((), torch.float32),
        tensor((images,), torch.float32),
    )  # fmt: skip


def _compiled(
    forward: list[Operation], backward: list[Operation], *, recomputed: bool
) -> tuple[list[Operation], list[Operation], list[Operation]]:
    """The kernels of the forward, of its recomputation and of the backward, which are graphs of their own."""
    saved = {access.value for operation in backward for access in operation.reads}
    keeping = fuse(forward, saved)
    if not recomputed:
        return keeping, [], fuse(backward)
    return fuse(forward), keeping, fuse(backward)


def _without_identity(operations: Iterable[Operation], count: int) -> dict[Operation, int]:
    """Operations without the numbers of their values, so that equal ones are counted together."""
    found: Counter[Operation] = Counter()
    for operation in operations:
        found[operation.without_identity()] += count
    return found


def _accumulation(parameters: int, precision: Precision) -> Operation:
    """A gradient is added to the sum of the step, in float32."""
    reads = (2 if precision == "bf16" else 4) + 4
    return Operation("elementwise", "add_gradients", _sizes(reads * parameters), _sizes(4 * parameters))


def _adamw(parameters: int, precision: Precision, shares: int) -> Operation:
    """Reads master weight, moments and gradient, writes all but the gradient; the weights are read and written again
    in their dtype, all of them."""
    share = -(-parameters // shares)
    weights = (2 if precision == "bf16" else 4) * parameters
    return Operation("elementwise", "adamw", _sizes(16 * share), _sizes(12 * share + weights))


def _sizes(size: int) -> tuple[Access, ...]:
    return (Access(0, size),)
