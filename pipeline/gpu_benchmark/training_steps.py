"""Steps of the stage with its own engine: how long they take, what they hold, and to which bits they lead."""

import math
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data.stream import MicroBatch
from models.host_tensors import to_device
from models.norm import discard_recorded_statistics
from pipeline.faults.preemption import REASONS
from pipeline.faults.watchdog import Watchdog
from pipeline.fingerprint import fingerprint
from pipeline.gpu_benchmark.machine import this_device
from pipeline.gpu_benchmark.record import StepsRun, Work
from pipeline.gpu_benchmark.subject import MeasuredStage, join, noise
from pipeline.gpu_benchmark.timing import Roofline, wait_for
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.training.images import normalized
from pipeline.training.loss import class_targets, classification_loss
from pipeline.training.step import StepContext, StepResult, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_state import TrainingState
from pipeline.weights import build_model
from pipeline.zero.engine import ZeroEngine, build_engine

COMPARED_STEPS = 4
"""Steps whose losses are recorded, and after which the state has its fingerprint."""
_MOST_TIMED, _MOST_TIMED_ON_CPU, _TIMED_SECONDS = 12, 3, 6.0
_ADAMW_BYTES = 28  # of a weight: it, its gradient and its two moments are read, and it and the moments written


class Rank:
    """One rank in training, as `pipeline.train` builds it from the beginning of a stage.

    Args:
        plan: of the stage.
        ranks: this process alone.
    """

    def __init__(self, plan: TrainPlan, ranks: Ranks) -> None:
        stage = plan.stage
        self.plan, self.ranks = plan, ranks
        self.engine: ZeroEngine = build_engine(build_model(plan, ranks.device), stage, ranks)
        self.engine.train()
        self.state = TrainingState(self.engine, ranks, stage.ema_decay)
        self.step = 0
        """Steps taken."""
        self._reader: Iterator[MicroBatch] = noise(plan, ranks.device)
        # It is not entered, and so does not watch: the process that started this one does.
        watchdog = Watchdog(stage.watchdog, 0, 1, "", Path(os.devnull), lambda *_: os._exit(1))
        self._context = StepContext(self.engine, plan, ranks, StepClock(ranks.device), watchdog)

    def take_step(self) -> StepResult:
        """Take the next step of the stage."""
        self.engine.set_learning_rate(self.plan.learning_rate(self.step))
        result = take_step(self._context, self._reader, self.step, StepMessage([0.0] * len(REASONS), 0.0, [0.0, 0.0]))
        if result.applied:
            self.state.update_average()
        self._context.clock.step_done()
        self.step += 1
        return result

    def fingerprint(self) -> str:
        """Of all that a checkpoint would hold."""
        live = {
            f"{kind}.{one.parameter}.{one.start}": tensor
            for one in self.state.fragments
            for kind, tensor in one.tensors.items()
        }
        return fingerprint(live | dict(self.engine.module.named_buffers()))

    def optimizer_seconds(self) -> float:
        """Seconds of clipping and AdamW, after the backward of a step; the fastest of three steps."""
        return min(self._optimizer_step() for _ in range(3))

    def _optimizer_step(self) -> float:
        stage, device, rounds = self.plan.stage, self.ranks.device, self.plan.stage.batch.micro_batches
        with self.engine.micro_batches(rounds):
            for turn in range(rounds):
                batch = next(self._reader)
                images = normalized(batch.images, device, self.engine.dtype)
                labels = to_device(torch.from_numpy(batch.labels), device)
                smoothing, kind = stage.loss.label_smoothing, stage.loss.kind
                targets = class_targets(labels, len(self.plan.classes), kind=kind, label_smoothing=smoothing)
                loss = classification_loss(self.engine(images), targets, kind).mean()
                self.engine.backward(loss)
                if turn + 1 < rounds:
                    self.engine.accumulate()
        wait_for(device)
        began = time.perf_counter()
        self.engine.step(loss.detach())
        wait_for(device)
        seconds = time.perf_counter() - began
        discard_recorded_statistics(self.engine.module)
        return seconds


def measure_steps(subject: MeasuredStage) -> StepsRun:
    """Take `COMPARED_STEPS` steps from the seed, then time further ones.

    Raises:
        ConfigError: settings that contradict each other.
        torch.OutOfMemoryError: the micro-batch does not fit the GPU.
    """
    plan = subject.plan()
    ranks = join(plan)
    device = ranks.device
    rank = Rank(plan, ranks)
    losses: list[float | None] = []
    began = time.perf_counter()
    for number in range(COMPARED_STEPS):
        loss = rank.take_step().loss
        losses.append(loss if math.isfinite(loss) else None)
        wait_for(device)
        if number == 0:
            first = time.perf_counter() - began
    after = rank.fingerprint()
    seconds: list[float] = []
    most = _MOST_TIMED if device.type == "cuda" else _MOST_TIMED_ON_CPU
    while len(seconds) < 2 or (len(seconds) < most and sum(seconds) < _TIMED_SECONDS):
        began = time.perf_counter()
        rank.take_step()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    peak = peak_bytes(device)
    return StepsRun(
        losses=tuple(losses),
        fingerprint=after,
        first_step_seconds=first,
        step_milliseconds=1e3 * statistics.median(seconds),
        timed_steps=len(seconds),
        images_per_second=plan.stage.batch.global_size / statistics.median(seconds),
        peak_bytes=peak,
        optimizer=_optimizer_work(rank, Roofline.of(this_device(device), plan.stage.precision)),
    )


def _optimizer_work(rank: Rank, roofline: Roofline) -> Work:
    elements = sum(math.prod(shape) for shape in rank.engine.parameters.shapes.values())
    size = elements * (_ADAMW_BYTES + (2 if rank.plan.stage.precision == "bf16" else 0))
    # A dozen operations for each weight; the bytes decide.
    return roofline.work(rank.optimizer_seconds(), 12 * elements, size)


def peak_bytes(device: torch.device) -> int:
    """The most bytes that torch has allocated on a GPU, or on a CPU that this process has held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
