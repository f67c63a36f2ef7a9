"""One start of a training stage on one rank: its progress, and the parts of the loop in `train.py`."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from rich.console import Console

from pipeline.checkpoints.manifest import RunFacts, step_name
from pipeline.checkpoints.resume import newest_intact
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import checkpoint_store, known_stores
from pipeline.distributed import Ranks
from pipeline.errors import Preempted, RunFailed
from pipeline.evaluate import Accuracy, EvaluationStopped, evaluate
from pipeline.event_log import Event
from pipeline.faults.non_finite import NonFiniteSteps
from pipeline.faults.preemption import StopRequests, agreed_reason
from pipeline.faults.watchdog import Watchdog
from pipeline.images import grid, viewable
from pipeline.monitoring.histograms import weight_histograms
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.norms import AdamWStep, weight_and_update_norms
from pipeline.monitoring.sample_log import SampleLog
from pipeline.plan import TrainPlan
from pipeline.run_folder import RunFolder
from pipeline.step import StepContext, StepResult, take_step
from pipeline.step_message import StepMessage
from pipeline.training_batches import read_micro_batches
from pipeline.training_state import TrainingState


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a stage runs in, on one rank."""

    folder: RunFolder
    ranks: Ranks
    console: Console | None
    """The terminal of the user, on the leader only."""
    requests: StopRequests
    watchdog: Watchdog


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where a start of a stage begins."""

    step: int
    """Steps taken before it."""
    skipped: int
    """Samples that had to be replaced in these."""
    checkpoint: str | None
    """Name of the checkpoint that it continues from; None for the first start."""


class TrainingRun:
    """A training stage under way; all ranks call its methods in the same order.

    Args:
        plan: of the stage.
        context: what it runs in.
        state: what is trained.
        monitor: shows it.
        saver: saves it.
        start: where this start begins.
        facts: what the manifest of every checkpoint of the stage holds.

    Attributes:
        step: steps taken.
        skipped: samples that had to be replaced, over all starts.
        first_bad_step: the first step, from 0, of so many in a row that are not finite that the run has to be rolled
            back; None if it does not.
    """

    def __init__(
        self,
        plan: TrainPlan,
        context: RunContext,
        state: TrainingState,
        monitor: Monitor,
        saver: Saver,
        start: StartPoint,
        facts: RunFacts,
    ) -> None:
        self._plan, self._context, self._state, self._monitor, self._saver = plan, context, state, monitor, saver
        self._start, self._facts = start, facts
        self.step, self.skipped = start.step, start.skipped
        self.first_bad_step: int | None = None
        folder, ranks = context.folder, context.ranks
        self._step_context = StepContext(state.engine, plan, ranks, monitor.clock, context.watchdog)
        self._reader = read_micro_batches(plan, folder, ranks, start.step)
        self._non_finite = NonFiniteSteps(plan, folder, ranks)
        self._sample_log = SampleLog(folder, plan, ranks) if plan.stage.log.samples else None
        self._save_is_due = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self._plan.steps

    @property
    def evaluates_average(self) -> bool:
        """Whether evaluations use the moving average instead of the raw weights."""
        return self._state.has_average and self._plan.stage.evaluation.weights != "raw"

    def is_due(self, every_steps: int | None) -> bool:
        """Whether something that happens every `every_steps` steps happens after this one."""
        return every_steps is not None and self.step > 0 and self.step % every_steps == 0

    def take_step(self) -> StepResult:
        """Take the next step, count it, and move the average."""
        ranks, requests, monitor = self._context.ranks, self._context.requests, self._monitor
        with self._context.watchdog.section("step"):
            began = time.monotonic()
            self._state.engine.set_learning_rate(self._plan.learning_rate(self.step))
            times = monitor.clock.contribution(ranks.rank, ranks.world_size)
            message = StepMessage(requests.flags, float(monitor.histograms_due(self.step + 1)), times)
            result = take_step(self._step_context, self._reader, self.step, message)
            if result.applied:
                self._state.update_average()
                if self._sample_log:
                    self._sample_log.write(self.step, result.batches)
            if self.step == 0:
                monitor.images(grid(viewable(result.images)))
            self.first_bad_step = self._non_finite.count(self.step, result)
            self.step += 1
            self.skipped += result.skipped
            monitor.clock.step_done()
            monitor.add_rank_times(result.message.rank_times)
            requests.margin.step_took(time.monotonic() - began)
        return result

    def report_step(self, result: StepResult) -> None:
        """Show the last step."""
        engine, stage = self._state.engine, self._plan.stage
        rate = self._plan.learning_rate(self.step - 1)
        parameters = engine.parameters
        adamw = AdamWStep(stage.optimizer, rate, engine.optimizer_steps, parameters.undecayed, parameters.rate_scales)
        with self._monitor.paused():
            norms = weight_and_update_norms(self._state.fragments, stage.model.variant, adamw, self._context.ranks)
        scalars = {
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/gradient_norm": result.gradient_norm,
            "train/skipped_samples": self.skipped,
            "train/steps_not_applied": self._non_finite.total,
        }
        self._monitor.step(self.step, {**scalars, **norms})

    def report_histograms(self) -> None:
        """Show histograms of the weights."""
        parameters = list(self._state.engine.parameters.shapes)
        with self._monitor.paused():
            histograms = weight_histograms(self._state.fragments, parameters, self._context.ranks)
            self._monitor.histograms(self.step, histograms)

    def save_if_due(self) -> None:
        """Begin a save if the recipe wants one, or the stage is done.

        After steps that are not finite it is put off until one is: a roll-back needs weights from before them.
        """
        self._save_is_due = self._save_is_due or self.is_due(self._plan.stage.checkpoint.every_steps)
        if self.is_done or (self._save_is_due and not self._non_finite.in_a_row):
            self.save()
            self._save_is_due = False

    def save(self) -> None:
        """Begin to save the state, unless it is saved; a second call after the same step does nothing."""
        if self._start.checkpoint and self.step == self._start.step:
            return
        with self._context.watchdog.section("save"), self._monitor.paused():
            self._monitor.flush()
            samples = self.step * self._plan.stage.batch.global_size
            self._saver.save(self._state.live(self._facts, self.step, samples, self.skipped))

    def save_and_wait(self) -> None:
        """Save the state, and wait until the checkpoint is published.

        Raises:
            RunFailed: it cannot be.
        """
        self.save()
        with self._context.watchdog.section("save"), self._monitor.paused():
            self._saver.finish_or_retry()
        self.report_saves()

    def report_saves(self) -> None:
        """Show the outcome of the saves that have ended since the last call."""
        reports = self._saver.reports()
        self._monitor.saved(reports)
        for report in reports:
            if report.failure is None:
                self._context.requests.margin.save_took(report.seconds)

    def stop(self, reason: str) -> NoReturn:
        """Save, and end this start.

        Raises:
            Preempted: always.
        """
        self.save()
        with self._context.watchdog.section("save"):
            saved = step_name(self.step) if self._saver.finish() else None
        self.report_saves()
        if self._context.ranks.is_leader:
            self._context.folder.events.record(Event.STOP, reason=reason, step=self.step, checkpoint=saved)
        raise Preempted(reason, self.step, saved)

    def evaluate(self) -> Accuracy:
        """Evaluate the weights that the recipe names, and show the accuracy.

        Raises:
            Preempted: a rank was asked to stop meanwhile.
        """
        ranks, requests, engine = self._context.ranks, self._context.requests, self._state.engine
        # A time limit that is near from the beginning must not keep every start from an evaluation that is left.
        stepped = self.step != self._start.step
        engine.eval()
        try:
            with (
                self._context.watchdog.section("evaluation"),
                self._monitor.paused(),
                self._state.averaged() if self.evaluates_average else nullcontext(),
            ):
                accuracy = evaluate(
                    engine,
                    self._plan,
                    self._context.folder,
                    ranks,
                    engine.dtype,
                    lambda: requests.reason is not None and (stepped or requests.signalled),
                )
        except EvaluationStopped:
            flags = torch.tensor(requests.flags, device=ranks.device)
            self.stop(agreed_reason(ranks.sum(flags).tolist()) or "a signal")
        engine.train()
        self._monitor.evaluation(self.step, accuracy)
        return accuracy

    def evaluate_if_missed(self) -> None:
        """After a resume: evaluate if an evaluation was due after this step and the earlier start ended before it."""
        if self.is_due(self._plan.stage.evaluation.every_steps) and not self.is_done:
            missed = self._context.ranks.is_leader and not self._context.folder.events.evaluated(self.step)
            if self._context.ranks.broadcast(missed):
                self.evaluate()

    def roll_back(self, first_bad_step: int) -> None:
        """Return to the weights from before `first_bad_step`, from 0, and continue with the data from here.

        The samples between the two, which led to steps that were not finite, are skipped.

        Raises:
            RunFailed: there is no checkpoint from before.
        """
        folder, ranks = self._context.folder, self._context.ranks
        with self._context.watchdog.section("save"), self._monitor.paused():
            self._saver.finish()
            # A checkpoint of exactly that step holds the weights that led to it.
            stores = known_stores(folder, checkpoint_store(folder, self._plan.stage))
            checkpoint, damaged = newest_intact(stores, ranks, before=first_bad_step)
            self._monitor.damaged_checkpoints(damaged)
            if checkpoint is None:
                raise RunFailed(
                    f"steps from {first_bad_step + 1} on were not finite, and there is no checkpoint from before step "
                    f"{first_bad_step} to go back to; lower optimizer.peak_learning_rate in a run of another name"
                )
            self._state.load(checkpoint)
            checkpoint.close()
        self.save_and_wait()
        if ranks.is_leader:
            folder.events.record(Event.ROLL_BACK, step=self.step, to=checkpoint.step)
            self._monitor.notify(
                f"steps from {first_bad_step + 1} to {self.step} were not finite: continues from step {self.step} with "
                f"the weights of {checkpoint.name}"
            )
        self._reader.close()
        self._reader = read_micro_batches(self._plan, folder, ranks, self.step)
        self._non_finite.reset()
