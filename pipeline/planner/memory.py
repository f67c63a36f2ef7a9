"""Memory of a training step on one rank: what DeepSpeed holds, by formulas, and what a micro-batch needs, traced."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.norm import discard_recorded_statistics
from pipeline.planner.trace.gpu_functions import GpuFunctions
from pipeline.planner.trace.live_bytes import LiveBytes
from pipeline.planner.trace.training_trace import Workload, build_on_meta
from pipeline.recipe.sections import CommunicationSettings
from pipeline.state_bytes import bucket_bytes, bytes_of_state


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one rank at the moment of a step when most is in use, beside what kernels allocate for themselves."""

    parameters: int
    """Of the model: their number."""
    weights: int
    gradients: int
    optimizer_state: int
    moving_average: int
    buffers: int
    """BatchNorm's statistics, and their records."""
    buckets: int
    """DeepSpeed's `reduce_bucket_size`, and what ZeRO 3 gathers up to `stage3_max_live_parameters`."""
    working: int
    """The peak of a micro-batch: activations, gradients on their way, temporary tensors, casts of weights, input, and
    a bucket's float32 copy while it is summed."""

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.held + self.working

    @property
    def held(self) -> int:
        """What exists during the whole step."""
        state = self.weights + self.gradients + self.optimizer_state + self.moving_average
        return state + self.buffers + self.buckets


def step_memory(
    subject: Workload,
    zero_stage: int,
    ranks: int,
    *,
    moving_average: bool = False,
    rounds: int = 2,
    communication: CommunicationSettings | None = None,
    on_cpu: bool = False,
) -> StepMemory:
    """The memory of each of `ranks` ranks that compute `rounds` micro-batches each in a step.

    Gradients count whole for the backward, as from the second micro-batch on; with a single one the peak is lower.
    `on_cpu` is for ranks without GPUs, where attention stores its scores.
    """
    model = build_on_meta(subject)
    settings = communication or CommunicationSettings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copied = zero_stage == 2 and subject.precision == "bf16" and settings.gradients == "fp32"
    copy_bytes = 4 * min(parameters, settings.bucket_size) if copied else 0
    weights, gradients, state = bytes_of_state(parameters, subject.precision, zero_stage, ranks)
    average = (-(-parameters // ranks) if zero_stage else parameters) * 4 if moving_average else 0
    return StepMemory(
        parameters=parameters,
        weights=weights,
        gradients=gradients,
        optimizer_state=state,
        moving_average=average,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        buckets=bucket_bytes(parameters, subject.precision, zero_stage, ranks, settings) - copy_bytes,
        working=working_bytes(
            subject,
            holds_casts=rounds > 1 and zero_stage < 3 and subject.precision == "bf16_autocast",
            # Seen with DeepSpeed 0.19.8: bf16 gradients live on beside their places in the bucket. Not all of them do:
            # the peaks of small models are 1 % lower.
            holds_gradients=zero_stage == 3 and subject.precision == "bf16",
            copied_bucket=settings.bucket_size if copied else None,
            on_cpu=on_cpu,
        ),
    )


@cache
def working_bytes(
    subject: Workload,
    *,
    holds_casts: bool = True,
    holds_gradients: bool = False,
    copied_bucket: int | None = None,
    on_cpu: bool = False,
) -> int:
    """The most bytes beside weights and summed gradients that are alive in forward and backward of a micro-batch.

    From a run of the whole model on the meta device. Each gradient of a weight exists until it has been added up, or
    with `holds_gradients` until the end of the backward. With `holds_casts`, casts of weights under autocast live until
    the end of the step, as they serve all its micro-batches; otherwise those of one forward. `copied_bucket` is the
    number of gradients that are copied to float32 together when a bucket is full, for as long as they are summed.
    """
    model = build_on_meta(subject).train()
    in_bucket = 0

    def drop(parameter: Tensor) -> None:
        nonlocal in_bucket
        assert parameter.grad is not None
        if not holds_gradients:
            parameter.grad.float()  # as which it is added to the sum
            parameter.grad = None
        if copied_bucket is not None:
            if in_bucket and in_bucket + parameter.numel() > copied_bucket:
                torch.empty(in_bucket, dtype=torch.float32, device="meta")
                in_bucket = 0
            in_bucket += parameter.numel()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
    dtype = torch.bfloat16 if subject.precision == "bf16" else torch.float32
    live = LiveBytes("meta", [*model.parameters(), *model.buffers()])
    held = live.live
    autocast = torch.bfloat16 if subject.precision == "bf16_autocast" else None
    functions = GpuFunctions(autocast, on_cpu=on_cpu)
    shape = (subject.micro_batch, subject.image_size, subject.image_size, 3)
    for module in (model.stem, *model.blocks, model.head):
        module.forward = _inside(functions, module.forward)  # a recomputation in the backward is outside of any other
    rounds = 2 if holds_casts and autocast else 1  # the casts of the first exist during all of the second
    for _ in range(rounds):
        with torch.random.fork_rng(devices=[]), live:
            torch.manual_seed(0)  # for which images stochastic depth drops
            images = torch.empty(shape, dtype=torch.float32, device="meta")
            logits = model(images.to(dtype))
            if not holds_casts:
                functions.forget_casts()
            targets = torch.empty(logits.shape, dtype=torch.float32, device="meta")
            loss = -(targets * logits.float().log_softmax(-1)).sum(-1).mean()
            del logits
            torch.autograd.backward(loss)
            model.zero_grad()
        with live:
            if in_bucket:  # what is left when the backward ends
                torch.empty(in_bucket, dtype=torch.float32, device="meta")
                in_bucket = 0
    discard_recorded_statistics(model)
    return live.peak - held


def _inside(functions: GpuFunctions, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` that runs with `functions`."""

    def run(*arguments: Any) -> Tensor:
        with functions:
            return forward(*arguments)

    return run
