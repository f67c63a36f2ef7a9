"""One rank of the test of evaluations that are stopped: `python stopped_evaluation_worker.py RECIPE FOLDER`.

Trains eight steps with an evaluation after the fourth into FOLDER/undisturbed, and again into FOLDER/stopped. There,
rank 1 alone receives SIGTERM when that evaluation begins and, in a second start, when the last one begins; a third start
is left alone.
"""

import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline.distributed import Ranks, join_ranks, leave_ranks
from pipeline.errors import Preempted
from pipeline.evaluate import evaluate
from pipeline.faults.preemption import StopSignals
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.run_folder import RunFolder
from tests.support.training import end_here, train_here


def stopped_at(number: int, folder: RunFolder, planned: TrainPlan, ranks: Ranks) -> None:
    """Train until evaluation `number` of this start, from 0, during which a signal arrives."""
    signals, seen = StopSignals(end_here), [0]

    def interrupted(*arguments: Any) -> Any:
        if seen[0] == number and ranks.rank == 1:
            signals._handler(signal.SIGTERM)
        seen[0] += 1
        return evaluate(*arguments)

    try:
        with patch("pipeline.training_run.evaluate", interrupted):
            train_here(planned, folder, ranks, signals=signals)
    except Preempted as stop:
        (folder.path / f"stop-{stop.step}-{ranks.rank}").write_text(str(stop))


def main(recipe: Path, folder: Path) -> None:
    ranks = join_ranks(1)
    settings = ["pretrain.steps=8", "pretrain.checkpoint.every_steps=100", "evaluation.every_steps=4"]
    planned = plan_stage(load_recipe(recipe, settings), "pretrain", ranks.world_size)
    assert isinstance(planned, TrainPlan)
    train_here(planned, RunFolder(folder / "undisturbed"), ranks)
    stopped = RunFolder(folder / "stopped")
    stopped_at(0, stopped, planned, ranks)
    stopped_at(1, stopped, planned, ranks)
    train_here(planned, stopped, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_ranks()
