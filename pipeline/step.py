"""One optimizer step on one rank: forward and backward over its micro-batches, one exchange, the update."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.random_streams import RandomStream
from data.stream import MicroBatch
from models.norm import discard_recorded_statistics, move_running_statistics, recorded_statistics
from pipeline.distributed import Ranks
from pipeline.faults.watchdog import Watchdog
from pipeline.images import normalized
from pipeline.loss import class_targets, classification_loss
from pipeline.mixup import mixed, mixing_weight
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan
from pipeline.zero.engine import model_dtype, optimizer_step


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step; the first four are the same on all ranks."""

    loss: float
    """The mean over the global batch."""
    gradient_norm: float
    """Before clipping."""
    skipped: int
    """Samples that had to be replaced."""
    notes: list[float]
    """The sums over the ranks of what each gave."""
    batches: list[MicroBatch]
    """Those of this rank."""
    losses: Tensor
    """(micro-batches of this rank,) float32, the mean of each."""
    pictures: Tensor
    """The first micro-batch of this rank as the model sees it: (m, S, S, 3) float32, normalized."""

    @property
    def applied(self) -> bool:
        """False if the loss or the gradient is not finite: then nothing of the run's state has changed."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.gradient_norm))


def take_step(
    engine: Any,
    plan: TrainPlan,
    reader: Iterator[MicroBatch],
    step: int,
    ranks: Ranks,
    notes: Sequence[float],
    clock: StepClock,
    watchdog: Watchdog,
) -> StepResult:
    """Take step `step`, from 0, with the next micro-batches of `reader`.

    Args:
        notes: of this rank; summed over all ranks in the exchange that a step needs anyway.
    """
    rounds = plan.stage.batch.micro_batches // ranks.world_size
    first = ranks.rank * rounds
    batches, losses, pictures = [], [], torch.empty(0)
    for turn in range(rounds):
        watchdog.at("reading", step, turn)
        with clock.waiting_for_data():
            batch = next(reader)
        watchdog.at("computing", step, turn)
        images, targets = _inputs(batch, plan, step, first + turn, ranks.device)
        # What is dropped follows from the micro-batch's place in the run, not from where it is computed.
        torch.manual_seed(RandomStream.STOCHASTIC_DEPTH.torch_seed(plan.seed, step, first + turn))
        with clock.computing():
            logits = engine(images.to(model_dtype(plan.stage.precision)))
            loss = classification_loss(logits, targets, plan.stage.loss.kind).mean()
        engine.backward(loss)
        batches.append(batch)
        losses.append(loss.detach())
        pictures = images if turn == 0 else pictures
        if turn + 1 < rounds:
            engine.step()  # only counts: DeepSpeed applies the gradient with the last micro-batch

    watchdog.at("exchanging", step, rounds - 1)
    own = torch.stack(losses)
    told = own.new_tensor([sum(len(batch.skipped) for batch in batches), *notes])
    sums = ranks.sum(torch.cat([own.sum()[None], told, recorded_statistics(engine.module)]))
    statistics = sums[1 + len(told) :] / plan.stage.batch.micro_batches
    loss_sum, skipped, *noted = sums[: 1 + len(told)].tolist()
    mean = loss_sum / plan.stage.batch.micro_batches
    norm = optimizer_step(engine, apply=bool(np.isfinite(mean)))
    result = StepResult(mean, norm, round(skipped), noted, batches, own, pictures)
    if result.applied:
        move_running_statistics(engine.module, statistics)
    else:
        discard_recorded_statistics(engine.module)
    return result


def _inputs(batch: MicroBatch, plan: TrainPlan, step: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures (m, S, S, 3) and targets (m, classes), float32 on the device, mixed where the recipe mixes."""
    stage = plan.stage
    images = normalized(batch.images, device, torch.float32)
    labels = torch.from_numpy(batch.labels).to(device, non_blocking=True)
    smoothing = stage.loss.label_smoothing
    targets = class_targets(labels, len(plan.classes), kind=stage.loss.kind, label_smoothing=smoothing)
    if stage.mixup_alpha:
        weight = mixing_weight(stage.mixup_alpha, seed=plan.seed, step=step, number=number)
        images, targets = mixed(images, weight), mixed(targets, weight)
    return images, targets
