"""One start of a training stage on one rank: where it stands, and what the loop in `train.py` asks of it."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from rich.console import Console

from pipeline.checkpoints.manifest import step_name
from pipeline.checkpoints.resume import newest_whole
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import checkpoint_store, known_stores
from pipeline.distributed import Ranks
from pipeline.errors import Preempted, RunFailed
from pipeline.evaluate import Accuracy, EvaluationStopped, evaluate
from pipeline.faults.preemption import StopRequests, agreed_reason
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.monitor import Monitor
from pipeline.plan import TrainPlan
from pipeline.run_folder import RunFolder
from pipeline.training_state import TrainingState
from pipeline.zero.engine import model_dtype


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a stage runs in, on one rank."""

    folder: RunFolder
    ranks: Ranks
    console: Console | None
    """Where a person looks; the leader has one."""
    requests: StopRequests
    watchdog: Watchdog


@dataclass(slots=True)
class TrainingRun:
    """A training stage under way; all ranks call its methods in the same order."""

    plan: TrainPlan
    context: RunContext
    engine: Any
    state: TrainingState
    monitor: Monitor
    saver: Saver
    facts: dict[str, Any]
    """What the manifest of every checkpoint of the stage says."""
    step: int
    """Steps taken."""
    skipped: int
    """Samples that had to be replaced, over all starts."""
    resumed_from: int | None
    """Step of the checkpoint that this start began with."""

    @property
    def ended(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.plan.steps

    @property
    def evaluates_average(self) -> bool:
        """Whether it is the moving average that is evaluated."""
        return self.state.has_average and self.plan.stage.evaluation.weights != "raw"

    def due(self, every_steps: int | None) -> bool:
        """Whether what happens every so many steps happens now."""
        return every_steps is not None and self.step > 0 and self.step % every_steps == 0

    def save(self) -> None:
        """Begin to save the state, unless it is saved; a second call after one step does nothing."""
        if self.step == self.resumed_from:
            return
        with self.context.watchdog.section("save"), self.monitor.paused():
            self.monitor.flush()
            samples = self.step * self.plan.stage.batch.global_size
            facts = {**self.facts, "step": self.step, "samples": samples, "skipped_samples": self.skipped}
            self.saver.save(self.state.live(facts))

    def save_whole(self) -> None:
        """Save the state, and wait until the checkpoint is published.

        Raises:
            RunFailed: it cannot be.
        """
        self.save()
        with self.context.watchdog.section("save"), self.monitor.paused():
            self.saver.finish_whole()
        self.tell_of_saves()

    def tell_of_saves(self) -> None:
        """Show how the saves went that have ended since the last call."""
        reports = self.saver.reports()
        self.monitor.saved(reports)
        for report in reports:
            if report.failure is None:
                self.context.requests.margin.save_took(report.seconds)

    def stop(self, reason: str) -> NoReturn:
        """Save, and leave.

        Raises:
            Preempted: always.
        """
        self.save()
        with self.context.watchdog.section("save"):
            saved = step_name(self.step) if self.saver.finish() else None
        self.tell_of_saves()
        if self.context.ranks.leads:
            self.context.folder.events.record("stop", reason=reason, step=self.step, checkpoint=saved)
        raise Preempted(reason, self.step, saved)

    def evaluate(self) -> Accuracy:
        """Evaluate the weights that the recipe names, and show the accuracy.

        Raises:
            Preempted: a rank was asked to stop meanwhile.
        """
        stage, requests = self.plan.stage, self.context.requests
        # A limit that is near at once must not keep every start from what is left to do.
        stepped = self.step != (self.resumed_from or 0)
        self.engine.eval()
        try:
            with (
                self.context.watchdog.section("evaluation"),
                self.monitor.paused(),
                self.state.averaged() if self.evaluates_average else nullcontext(),
            ):
                accuracy = evaluate(
                    self.engine,
                    self.plan,
                    self.context.folder,
                    self.context.ranks,
                    model_dtype(stage.precision),
                    lambda: requests.reason is not None and (stepped or requests.signalled),
                )
        except EvaluationStopped:
            flags = torch.tensor(requests.flags, device=self.context.ranks.device)
            self.stop(agreed_reason(self.context.ranks.sum(flags).tolist()) or "a signal")
        self.engine.train()
        self.monitor.evaluation(self.step, accuracy)
        return accuracy

    def evaluate_if_missed(self) -> None:
        """After a resume: the evaluation after this step, if it was due and the start that should have died in it."""
        if self.due(self.plan.stage.evaluation.every_steps) and not self.ended:
            missed = self.context.ranks.leads and not self.context.folder.events.evaluated(self.step)
            if self.context.ranks.from_leader(missed):
                self.evaluate()

    def roll_back(self, first_bad: int) -> None:
        """Take the weights from before `first_bad`, a step from 0 that was not finite, and keep the place in the data.

        What lies between was trained on samples that led there, and is passed over.

        Raises:
            RunFailed: there is no checkpoint from before.
        """
        folder, ranks = self.context.folder, self.context.ranks
        with self.context.watchdog.section("save"), self.monitor.paused():
            self.saver.finish()
            # The one from exactly there holds the weights that led to it.
            places = known_stores(folder, checkpoint_store(folder, self.plan.stage))
            checkpoint, damaged = newest_whole(places, ranks, before=first_bad)
            self.monitor.damaged_checkpoints(damaged)
            if checkpoint is None:
                raise RunFailed(
                    f"steps from {first_bad + 1} on were not finite, and there is no checkpoint from before step "
                    f"{first_bad} to go back to; lower optimizer.peak_learning_rate in a run of another name"
                )
            self.state.load(checkpoint)
            checkpoint.close()
        self.save_whole()
        if ranks.leads:
            folder.events.record("roll_back", step=self.step, to=checkpoint.step)
            self.monitor.notify(
                f"steps from {first_bad + 1} to {self.step} were not finite: goes on from step {self.step} with the "
                f"weights of {checkpoint.name}"
            )
