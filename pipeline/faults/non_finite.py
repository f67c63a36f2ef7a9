"""Steps with a non-finite loss or gradient: their samples are logged by key, and too many such steps end the run."""

import numpy as np

from pipeline.distributed import Ranks
from pipeline.errors import RunFailed
from pipeline.event_log import Event
from pipeline.plan import TrainPlan
from pipeline.run_folder import RunFolder
from pipeline.step import StepResult


class NonFiniteSteps:
    """Counts the non-finite steps of this start; equal on all ranks.

    None of them was applied, so after a series of them the state is still that from before the first one.
    """

    def __init__(self, plan: TrainPlan, folder: RunFolder, ranks: Ranks) -> None:
        self._settings = plan.stage.non_finite
        self._folder = folder
        self._ranks = ranks
        self.in_a_row = 0
        """Length of the series that includes the last step; 0 if the last step was finite."""
        self.total = 0
        """Of this start."""

    def reset(self) -> None:
        """Begin a new series, after a roll-back."""
        self.in_a_row = 0

    def count(self, step: int, result: StepResult) -> int | None:
        """Count step `step`, from 0. Returns the first step of the series if it is so long that it must be rolled back.

        Raises:
            RunFailed: too many in a row, and no roll-back left of those that the recipe allows.
        """
        if result.applied:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.total += 1
        self._log_samples(step, result)
        if self.in_a_row < self._settings.in_a_row:
            return None
        first = step + 1 - self.in_a_row
        roll_backs = self._ranks.broadcast(len(self._folder.events.of(Event.ROLL_BACK)))
        if roll_backs >= self._settings.roll_backs:
            series = f"{self.in_a_row} steps in a row, from step {first + 1} on,"
            which = series if self.in_a_row > 1 else f"step {first + 1}"
            raise RunFailed(
                f"the loss or the gradient of {which} is not finite (most recently loss {result.loss}, gradient norm "
                f"{result.gradient_norm}); no such step was applied, and events.jsonl names the samples. Lower "
                "optimizer.peak_learning_rate or lengthen the warm-up in a run of another name, or set "
                "non_finite.roll_backs to return to the checkpoint from before, if there is one, and go on after these "
                "samples"
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
