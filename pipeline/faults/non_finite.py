"""Steps whose loss or gradient is not finite: told by the keys of their samples, and too many of them end the run."""

import numpy as np

from pipeline.distributed import Ranks
from pipeline.errors import RunFailed
from pipeline.plan import TrainPlan
from pipeline.run_folder import RunFolder
from pipeline.step import StepResult


class NonFiniteSteps:
    """Those of this start that came one after the other; the same on all ranks.

    None of them was applied, so the state is still that of before the first of them.
    """

    def __init__(self, plan: TrainPlan, folder: RunFolder, ranks: Ranks) -> None:
        self._settings = plan.stage.non_finite
        self._folder = folder
        self._ranks = ranks
        self.in_a_row = 0
        """Up to the last step."""
        self.total = 0
        """Of this start."""

    def reset(self) -> None:
        """The run was rolled back."""
        self.in_a_row = 0

    def count(self, step: int, result: StepResult) -> int | None:
        """Count step `step`, from 0. Returns the first step of a row that is too long and has to be rolled back.

        Raises:
            RunFailed: too many in a row, and none of the roll-backs that the recipe allows is left.
        """
        if result.applied:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.total += 1
        self._note(step, result)
        if self.in_a_row < self._settings.in_a_row:
            return None
        first = step + 1 - self.in_a_row
        done = self._ranks.from_leader(sum(entry["event"] == "roll_back" for entry in self._folder.events.entries()))
        if done >= self._settings.roll_backs:
            row = f"{self.in_a_row} steps in a row, from step {first + 1} on,"
            which = row if self.in_a_row > 1 else f"step {first + 1}"
            raise RunFailed(
                f"the loss or the gradient of {which} is not finite (at last loss {result.loss}, gradient norm "
                f"{result.gradient_norm}); nothing of it was applied, and events.jsonl names the samples. Lower "
                "optimizer.peak_learning_rate or lengthen the warm-up in a run of another name, or set "
                "non_finite.roll_backs to go back to the last checkpoint and on behind these samples"
            )
        return first

    def _note(self, step: int, result: StepResult) -> None:
        """Note the samples of this rank's micro-batches that did it: of all where only the whole gradient tells."""
        finite = result.losses.isfinite().tolist()
        if np.isfinite(result.loss):
            finite = [False] * len(finite)
        first = self._ranks.rank * len(finite)
        samples = {
            str(first + number): [f"{origin.shard}/{origin.key}" for origin in batch.origins]
            for number, (batch, fine) in enumerate(zip(result.batches, finite, strict=True))
            if not fine
        }
        if samples:
            self._folder.events.record(
                "not_finite",
                step=step + 1,
                loss=str(result.loss),
                gradient_norm=str(result.gradient_norm),
                rank=self._ranks.rank,
                samples_of_micro_batches=samples,
            )
