"""Steps with a non-finite loss or gradient: their samples are logged by key, and too many such steps end the run."""

from dataclasses import replace

import numpy as np

from pipeline.checkpoints.manifest import NonFiniteRecord, RollBack
from pipeline.errors import RunFailed
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.training.step import StepResult


class NonFiniteSteps:
    """Counts the non-finite steps of a run; equal on all ranks.

    None of them was applied, so after a series of them the weights are still those from before the first one. The
    record is a part of the run's state: a run that is stopped within a series continues to count it.

    Args:
        record: of the steps before this start.
    """

    def __init__(self, plan: TrainPlan, folder: RunFolder, ranks: Ranks, record: NonFiniteRecord) -> None:
        self._settings = plan.stage.non_finite
        self._folder = folder
        self._ranks = ranks
        self.record = record
        """Of all steps so far."""

    def rolled_back(self, to: int, at: int) -> None:
        """Record a roll-back, after which a new series begins."""
        roll_backs = (*self.record.roll_backs, RollBack(to, at))
        self.record = replace(self.record, not_applied_in_a_row=0, roll_backs=roll_backs)

    def can_return_to(self, step: int, first_bad_step: int) -> bool:
        """Whether the weights after `step` steps are from before `first_bad_step`, from 0, and not discarded since.

        Those after exactly `first_bad_step` steps are the ones that led to it. An earlier roll-back has left others
        behind it, which led to its own series: they are newer than those that it returned to, but lead there again.
        """
        return step < first_bad_step and not any(past.discarded(step) for past in self.record.roll_backs)

    def count(self, step: int, result: StepResult) -> int | None:
        """Count step `step`, from 0. Returns the first step of the series if it is so long that it must be rolled back.

        Raises:
            RunFailed: too many in a row, and no roll-back left of those that the recipe allows.
        """
        if result.applied:
            self.record = replace(self.record, not_applied_in_a_row=0)
            return None
        total, in_a_row = self.record.steps_not_applied + 1, self.record.not_applied_in_a_row + 1
        self.record = replace(self.record, steps_not_applied=total, not_applied_in_a_row=in_a_row)
        self._log_samples(step, result)
        if in_a_row < self._settings.in_a_row:
            return None
        first = step + 1 - in_a_row
        if len(self.record.roll_backs) >= self._settings.roll_backs:
            series = f"{in_a_row} steps in a row, from step {first + 1} on,"
            which = series if in_a_row > 1 else f"step {first + 1}"
            raise RunFailed(
                f"the loss or the gradient of {which} is not finite (most recently loss {result.loss}, gradient norm "
                f"{result.gradient_norm}); no such step was applied, and events.jsonl names the samples. Lower "
                "optimizer.peak_learning_rate from the last checkpoint on with --extend, or lengthen the warm-up in a "
                "run of another name, or set non_finite.roll_backs to return to the checkpoint from before, if there "
                "is one, and go on after these samples"
            )
        return first

    def _log_samples(self, step: int, result: StepResult) -> None:
        """Log the samples of this rank's non-finite micro-batches, or of all if only the gradient is not finite."""
        finite = result.losses.isfinite().tolist()
        if np.isfinite(result.loss):
            finite = [False] * len(finite)
        first = self._ranks.rank * len(finite)
        samples = {
            str(first + number): [f"{origin.shard}/{origin.key}" for origin in batch.origins]
            for number, (batch, is_finite) in enumerate(zip(result.batches, finite, strict=True))
            if not is_finite
        }
        if samples:
            self._folder.events.record(
                Event.NOT_FINITE,
                step=step + 1,
                loss=str(result.loss),
                gradient_norm=str(result.gradient_norm),
                rank=self._ranks.rank,
                samples_of_micro_batches=samples,
            )
