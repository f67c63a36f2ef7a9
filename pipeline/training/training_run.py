"""One start of a training stage on one rank: its progress, and the parts of the loop in `train.py`."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from rich.console import Console

from pipeline.checkpoints.locations import known_stores
from pipeline.checkpoints.manifest import NonFiniteRecord, RunFacts
from pipeline.checkpoints.resume import newest_intact
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import checkpoint_store
from pipeline.cross_check.accusation import CheckContext, accusation
from pipeline.cross_check.cross_check import CrossChecks, ValuesDiffer
from pipeline.cross_check.price import announcement, points, summary
from pipeline.errors import MachineFaulty, Preempted, RunFailed
from pipeline.evaluate import Accuracy, EvaluationStopped, evaluate
from pipeline.faults.non_finite import NonFiniteSteps
from pipeline.faults.preemption import REASONS, StopRequests, agreed_reason
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.histograms import weight_histograms
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.norms import AdamWStep, weight_and_update_norms
from pipeline.monitoring.sample_log import SampleLog
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.shard_verification import ShardVerification
from pipeline.training.images import grid, viewable
from pipeline.training.step import StepContext, StepResult, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_batches import read_micro_batches
from pipeline.training.training_state import TrainingState


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a stage runs in, on one rank."""

    folder: RunFolder
    ranks: Ranks
    console: Console | None
    """The terminal of the user, on the leader only."""
    requests: StopRequests
    watchdog: Watchdog
    run_id: str | None = None
    """See `pipeline.runs.run_identity`."""
    remarks: tuple[str, ...] = ()
    """Lines about the stage that a start shows."""
    node: str = ""
    """Name of this machine, as the scheduler knows it."""


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where a start of a stage begins."""

    step: int
    """Steps taken before it."""
    skipped: int
    """Samples that had to be replaced in these."""
    non_finite: NonFiniteRecord
    """Of these."""
    checkpoint: str | None
    """Name of the checkpoint that it continues from; None for the first start."""
    elsewhere: bool = False
    """Whether that is the last one of the stage, in a place that `checkpoint.folder` no longer names."""


@dataclass
class TrainingRun:
    """A training stage under way; all ranks call its methods in the same order."""

    plan: TrainPlan
    context: RunContext
    state: TrainingState
    monitor: Monitor
    saver: Saver
    verification: ShardVerification
    start: StartPoint
    facts: RunFacts
    """What the manifests of all checkpoints of the stage have in common."""

    def __post_init__(self) -> None:
        folder, ranks, plan = self.context.folder, self.context.ranks, self.plan
        self.step = self.start.step
        """Steps taken."""
        self.skipped = self.start.skipped
        """Samples that had to be replaced, over all starts."""
        self.first_bad_step: int | None = None
        """The first step, from 0, of a row that is not finite and so long that the run has to be rolled back."""
        engine, watchdog = self.state.engine, self.context.watchdog
        self._cross_checks = CrossChecks(engine, plan, ranks, watchdog, self.step, self.context.node)
        self._step_context = StepContext(engine, plan, ranks, self.monitor.clock, watchdog, self._cross_checks)
        self._reader = read_micro_batches(plan, folder, ranks, self.step)
        self._non_finite = NonFiniteSteps(plan, folder, ranks, self.start.non_finite)
        self._sample_log = SampleLog(folder, plan, ranks) if plan.stage.log.samples else None
        self._save_is_due = self._save_was_put_off()
        self._verified = self.verification.remark is None
        # The first step of a start is one that is checked, too.
        self._last_was_checked = self._cross_checks.every_steps is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()
        if self._cross_checks.every_steps and self.step > self.start.step:
            self.monitor.notify(summary(self._cross_checks), show=False)

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken that the settings are in force for."""
        return self.step == self.plan.until

    @property
    def evaluates_average(self) -> bool:
        """Whether evaluations use the moving average instead of the raw weights."""
        return self.state.has_average and self.plan.stage.evaluation.weights != "raw"

    def is_due(self, every_steps: int | None) -> bool:
        """Whether something that happens every `every_steps` steps happens after this one."""
        return every_steps is not None and self.step > 0 and self.step % every_steps == 0

    def take_step(self) -> StepResult:
        """Take the next step, count it, and move the average.

        Raises:
            MachineFaulty, RunFailed: its cross-check has found a rank that computes wrong values.
        """
        ranks, requests, monitor = self.context.ranks, self.context.requests, self.monitor
        with self.context.watchdog.section("step"):
            began = time.monotonic()
            self.state.engine.set_learning_rate(self.plan.learning_rate(self.step))
            times = monitor.clock.contribution(ranks.rank, ranks.world_size)
            histograms, verifying = monitor.histograms_due(self.step + 1), self.verification.check()
            message = StepMessage(requests.flags, float(histograms), times, float(verifying))
            try:
                result = take_step(self._step_context, self._reader, self.step, message)
            except ValuesDiffer as differ:
                raise self._accusation(differ) from None
            if result.applied:
                self.state.update_average()
                if self._sample_log:
                    self._sample_log.write(self.step, result.batches)
            if self.step == 0:
                monitor.images(grid(viewable(result.images)))
            self.first_bad_step = self._non_finite.count(self.step, result)
            self.step += 1
            self.skipped += result.skipped
            seconds = time.monotonic() - began
            if result.check_seconds is not None:
                monitor.clock.leave_out_step()
                facts = self._cross_checks, result.check_seconds, seconds
                monitor.cross_checked(self.step, points(*facts), announcement(*facts))
            monitor.clock.step_done()
            if not self._last_was_checked:  # the times in a message are those of the step before
                monitor.add_rank_times(result.message.rank_times)
            self._last_was_checked = result.check_seconds is not None
            if not result.message.verifying:
                self._note_verified()
            requests.margin.step_took(seconds)
        return result

    def _accusation(self, differ: ValuesDiffer) -> MachineFaulty | RunFailed:
        """The error of this start, after the save in flight, if there is one, has ended."""
        with self.context.watchdog.section("save"):
            self.saver.finish()
        self.report_saves(stopping=True)
        last_passed, limit = self._cross_checks.last_passed, self.plan.stage.verify.excluded_nodes
        now = CheckContext(self.step + 1, last_passed, self.saver.newest, limit)
        return accusation(differ, now, self.context.folder, self.context.ranks)

    def report_step(self, result: StepResult) -> None:
        """Show the last step."""
        engine, stage = self.state.engine, self.plan.stage
        rate = self.plan.learning_rate(self.step - 1)
        # Of its own: outside of sections, the watchdog learns no limit and waits as long as for the set-up.
        with self.context.watchdog.section("report"), self.monitor.paused():
            parameters = engine.parameters
            last_step = AdamWStep(
                stage.optimizer, rate, engine.optimizer_steps, parameters.undecayed, parameters.rate_scales
            )
            norms = weight_and_update_norms(self.state.fragments, stage.model.variant, last_step, self.context.ranks)
        scalars = {
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/gradient_norm": result.gradient_norm,
            "train/skipped_samples": self.skipped,
            "train/steps_not_applied": self._non_finite.record.steps_not_applied,
        }
        self.monitor.step(self.step, {**scalars, **norms})

    def report_histograms(self) -> None:
        """Show histograms of the weights."""
        parameters = list(self.state.engine.parameters.shapes)
        with self.context.watchdog.section("histograms"), self.monitor.paused():
            histograms = weight_histograms(self.state.fragments, parameters, self.context.ranks)
            self.monitor.histograms(self.step, histograms)

    def save_if_due(self) -> None:
        """Begin a save if the recipe wants one, or the stage is done.

        After steps that are not finite it is put off until one is: a roll-back needs weights from before them.
        """
        self._save_is_due = self._save_is_due or self.is_due(self.plan.stage.checkpoint.interval)
        if self.is_done or (self._save_is_due and not self._non_finite.record.not_applied_in_a_row):
            self.save()
            self._save_is_due = False

    def save(self, *, for_stop: bool = False) -> None:
        """Begin to save the state, unless it is saved; a second call after the same step does nothing."""
        if self.start.checkpoint and self.step == self.start.step and not self.start.elsewhere:
            return
        with self.context.watchdog.section("save"), self.monitor.paused():
            self.monitor.flush()
            samples = self.plan.samples_after(self.step)
            record = self._non_finite.record
            self.saver.save(
                self.state.live(
                    self.facts,
                    self.step,
                    samples,
                    self.skipped,
                    record,
                    for_stop=for_stop,
                    classes=self.plan.classes,
                )
            )

    def save_and_wait(self) -> None:
        """Save the state, and wait until the checkpoint is published.

        Raises:
            RunFailed, StorageDown: it cannot be.
        """
        self.save()
        with self.context.watchdog.section("save"), self.monitor.paused():
            self.saver.finish_or_retry()
        self.report_saves()

    def report_saves(self, *, stopping: bool = False) -> None:
        """Show the outcome of the saves that have ended since the last call."""
        reports = self.saver.reports()
        self.monitor.saved(reports, stopping=stopping)
        for report in reports:
            if report.failure is None:
                self.context.requests.margin.save_took(report.seconds - report.stall)

    def stop(self, reason: str) -> NoReturn:
        """Save, and end this start.

        If a save of an earlier step is in flight, it is finished first; then this step is saved if there is time left.

        Raises:
            Preempted: always.
        """
        with self.context.watchdog.section("save"):
            unsaved = "was not saved for lack of time" if self._too_late_for_another_save() else None
            if unsaved is None:
                self.save(for_stop=True)
                if not self.saver.finish():
                    unsaved = f"could not be saved ({self.saver.why_unsaved()})"
        self.report_saves(stopping=True)
        newest = self.saver.newest
        if self.context.ranks.is_leader:
            self.context.folder.events.record(Event.STOP, reason=reason, step=self.step, checkpoint=newest)
        raise Preempted(reason, self.step, newest, self.saver.location, unsaved)

    def _too_late_for_another_save(self) -> bool:
        """Finish a save of an earlier step that is in flight, and return whether it has to do, for lack of time."""
        if self.saver.in_flight in (None, self.step):
            return False
        published = self.saver.finish()
        self.report_saves(stopping=True)
        ranks, late = self.context.ranks, not self.context.requests.time_for_a_save
        return bool(ranks.sum(torch.tensor(late, dtype=torch.int64, device=ranks.device)).item()) and published

    def evaluate(self) -> Accuracy:
        """Evaluate the weights that the recipe names, and show the accuracy.

        Raises:
            Preempted: a rank was asked to stop meanwhile.
        """
        ranks, requests, engine = self.context.ranks, self.context.requests, self.state.engine
        engine.eval()
        try:
            with (
                self.context.watchdog.section("evaluation"),
                self.monitor.paused(),
                self.state.averaged() if self.evaluates_average else nullcontext(),
            ):
                accuracy = evaluate(engine, self.plan, self.context.folder, ranks, engine.dtype, self._asked_to_stop())
        except EvaluationStopped:
            flags = torch.tensor(requests.flags, device=ranks.device)
            self.stop(agreed_reason(ranks.sum(flags).tolist()) or "a signal")
        engine.train()
        self.monitor.evaluation(self.step, accuracy)
        return accuracy

    def finish_verification(self) -> None:
        """Wait until all local shards that the stage reads are verified.

        Raises:
            DataError: one is missing, or is not the indexed one.
            StorageDown: one cannot be read.
            Preempted: a rank was asked to stop meanwhile.
        """
        requests, asked_to_stop = self.context.requests, self._asked_to_stop()

        def flags() -> list[float]:
            return requests.flags if asked_to_stop() else [0.0] * len(REASONS)

        waits = "all steps are taken; the rest of the local shards is being verified"
        if stops := self.verification.wait(self.context.watchdog, lambda: self.monitor.notify(waits), flags):
            self.stop(agreed_reason(stops) or "a signal")
        self._note_verified()

    def _note_verified(self) -> None:
        if not self._verified:
            self.monitor.notify("all local shards are verified", show=False)
        self._verified = True

    def _asked_to_stop(self) -> Callable[[], bool]:
        """Says whether a request to stop ends what takes long and is not a step, from now on.

        A time limit that is near from the beginning must not keep every start from what is left after the last step.
        """
        requests = self.context.requests
        in_any_case = self.step == self.start.step and requests.reason is not None
        return lambda: requests.signalled or (requests.reason is not None and not in_any_case)

    def evaluate_if_missed(self) -> None:
        """After a resume: evaluate if an evaluation was due after this step and the earlier start ended before it."""
        if self.is_due(self.plan.stage.evaluation.every_steps) and not self.is_done:
            missed = self.context.ranks.is_leader and not self.context.folder.events.evaluated(self.step)
            if self.context.ranks.broadcast(missed):
                self.evaluate()

    def roll_back(self, first_bad_step: int) -> None:
        """Return to the weights from before `first_bad_step`, from 0, and continue with the data from here.

        The samples between the two, which led to steps that were not finite, are skipped. Checkpoints that an earlier
        roll-back has left behind are passed over, and those of stops, without which an undisturbed run must do.

        Raises:
            RunFailed: there is no checkpoint from before.
        """
        folder, ranks = self.context.folder, self.context.ranks
        with self.context.watchdog.section("save"), self.monitor.paused():
            self.saver.finish()
            stores = known_stores(folder, checkpoint_store(folder, self.plan.stage))
            checkpoint, damaged = newest_intact(
                stores,
                ranks,
                accepts=lambda step: self._non_finite.can_return_to(step, first_bad_step),
                for_stops=False,
            )
            self.monitor.damaged_checkpoints(damaged)
            if checkpoint is None:
                raise RunFailed(
                    f"steps from {first_bad_step + 1} on were not finite, and there is no checkpoint from before step "
                    f"{first_bad_step} to go back to (those of stops, and those that an earlier roll-back discarded, "
                    "do not count); lower optimizer.peak_learning_rate with --extend, or in a run of another name"
                )
            self.state.load(checkpoint)
            checkpoint.close()
        self._non_finite.rolled_back(checkpoint.step, self.step)
        self.save_and_wait()
        if ranks.is_leader:
            folder.events.record(Event.ROLL_BACK, step=self.step, to=checkpoint.step)
            self.monitor.notify(
                f"steps from {first_bad_step + 1} to {self.step} were not finite: continues from step {self.step} with "
                f"the weights of {checkpoint.name}"
            )
        self._reader.close()
        self._reader = read_micro_batches(self.plan, folder, ranks, self.step)

    def _save_was_put_off(self) -> bool:
        """Whether a save has been due since the series of non-finite steps began in which this start continues."""
        interval, in_a_row = self.plan.stage.checkpoint.interval, self.start.non_finite.not_applied_in_a_row
        return self.step // interval > (self.step - in_a_row) // interval
