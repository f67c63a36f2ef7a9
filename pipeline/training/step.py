"""One optimizer step on one rank: forward and backward over its micro-batches, one exchange, the update."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.random_streams import RandomStream
from data.stream import MicroBatch
from models.host_tensors import to_device
from models.norm import discard_recorded_statistics, move_running_statistics, recorded_statistics
from pipeline.cross_check.cross_check import CrossChecks
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.training.inputs import prepared_inputs
from pipeline.training.loss import classification_loss
from pipeline.training.step_message import StepMessage
from pipeline.zero.engine import ZeroEngine


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all steps of a run need on one rank."""

    engine: ZeroEngine
    plan: TrainPlan
    ranks: Ranks
    clock: StepClock
    watchdog: Watchdog
    cross_checks: CrossChecks | None = None
    on_gradient: Callable[[str, Tensor], None] | None = None
    """See `ZeroEngine.step`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of a step; the first four fields are the same on all ranks."""

    loss: float
    """The mean over the global batch."""
    gradient_norm: float
    """Before clipping."""
    skipped: int
    """Samples that had to be replaced."""
    message: StepMessage
    """The sum over the ranks."""
    batches: list[MicroBatch]
    """The micro-batches of this rank."""
    losses: Tensor
    """(micro-batches of this rank,) float32, the mean of each."""
    images: Tensor
    """The first micro-batch of this rank as the model sees it: (m, S, S, 3) float32, normalized."""
    check_seconds: float | None = None
    """That the cross-check of the step took; None if there was none."""

    @property
    def applied(self) -> bool:
        """False if the loss or the gradient is not finite: then nothing of the run's state has changed."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.gradient_norm))


def take_step(context: StepContext, reader: Iterator[MicroBatch], step: int, message: StepMessage) -> StepResult:
    """Take step `step`, from 0, with the next micro-batches of `reader`; `message` is that of this rank.

    Raises:
        ValuesDiffer: two ranks computed different values; the step is not applied, and the engine not usable any more.
    """
    engine, plan, ranks, watchdog = context.engine, context.plan, context.ranks, context.watchdog
    rounds = plan.stage.batch.micro_batches // ranks.world_size
    first = ranks.rank * rounds
    batches, losses, first_images, check = [], [], torch.empty(0), None
    with engine.micro_batches(rounds):
        for turn in range(rounds):
            watchdog.at("reading", step, turn)
            with context.clock.waiting_for_data():
                batch = next(reader)
            if turn == 0 and context.cross_checks:
                check = context.cross_checks.check_of(step, batch)
            watchdog.at("computing", step, turn)
            images, targets = prepared_inputs(batch, plan, step, first + turn, ranks.device)
            # Which samples are dropped depends on the micro-batch's position in the run, not on the rank that computes
            # it.
            torch.manual_seed(RandomStream.STOCHASTIC_DEPTH.torch_seed(plan.seed, step, first + turn))
            with context.clock.computing():
                logits = engine(images.to(engine.dtype))
                loss = classification_loss(logits, targets, plan.stage.loss.kind).mean()
            with check.observed(loss) if check and turn == 0 else nullcontext():
                engine.backward(loss)
            batches.append(batch)
            losses.append(loss.detach())
            first_images = images if turn == 0 else first_images
            if turn + 1 < rounds:
                engine.accumulate()

    if check:
        check.compare()
    watchdog.at("exchanging", step, rounds - 1)
    own = torch.stack(losses)
    skipped_here = sum(len(batch.skipped) for batch in batches)
    numbers = to_device(torch.tensor([skipped_here, *message.pack()], dtype=torch.float32), ranks.device)
    sums = ranks.sum(torch.cat([own.sum()[None], numbers, recorded_statistics(engine.module)]))
    statistics = sums[1 + len(numbers) :] / plan.stage.batch.micro_batches
    norm = engine.step(sums[0], context.on_gradient)
    # The one place where a step waits for the device.
    norm_read, loss_sum, skipped, *packed = torch.cat([norm[None], sums[: 1 + len(numbers)]]).tolist()
    mean = loss_sum / plan.stage.batch.micro_batches
    unpacked, seconds = StepMessage.unpack(packed), check.seconds if check else None
    result = StepResult(mean, norm_read, round(skipped), unpacked, batches, own, first_images, seconds)
    if result.applied:
        move_running_statistics(engine.module, statistics)
    else:
        discard_recorded_statistics(engine.module)
    return result
