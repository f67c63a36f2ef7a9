"""One rank of the test of evaluations that are stopped or fail: `python stopped_evaluation_worker.py RECIPE FOLDER`.

Trains eight steps with an evaluation after the fourth into FOLDER/undisturbed, and again into FOLDER/stopped. There,
rank 1 alone receives SIGTERM when that evaluation begins and, in a second start, when the last one begins; a third start
is left alone. Two more runs, FOLDER/in_time and FOLDER/late, receive it while a save is in flight. At last, in
FOLDER/failed, the first evaluation fails on rank 1 alone.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from data.errors import CoatnetError, DataError
from pipeline.errors import Preempted
from pipeline.evaluate import evaluate
from pipeline.faults.preemption import StopRequests, StopSignals
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks, join_ranks, name_lost_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from pipeline.training.step import StepContext, StepResult, take_step
from pipeline.training.step_message import StepMessage
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
        with patch("pipeline.training.training_run.evaluate", interrupted):
            train_here(planned, folder, ranks, signals=signals)
    except Preempted as stop:
        (folder.path / f"stop-{stop.step}-{ranks.rank}").write_text(str(stop))


def failed_alone(folder: RunFolder, planned: TrainPlan, ranks: Ranks) -> NoReturn:
    """Train until rank 1 cannot use its samples in an evaluation, and end as a process does then."""

    def broken(*arguments: Any) -> None:
        if ranks.rank == 1:
            raise DataError("too many samples of rank 1 cannot be used")

    try:
        with name_lost_ranks(), patch("pipeline.evaluate.note_skipped", broken):
            train_here(planned, folder, ranks)
    except CoatnetError as error:
        (folder.path / f"failed-{ranks.rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    raise AssertionError("both ranks have evaluated")


def stopped_with_a_save_in_flight(folder: RunFolder, planned: TrainPlan, ranks: Ranks) -> None:
    """Train until after step 3: a signal arrives during the second one, whose save is in flight then."""
    signals = StopSignals(end_here)

    def interrupted(context: StepContext, reader: Any, step: int, message: StepMessage) -> StepResult:
        if step == 1 and ranks.rank == 1:
            signals._handler(signal.SIGTERM)
        return take_step(context, reader, step, message)

    try:
        with patch("pipeline.training.training_run.take_step", interrupted):
            train_here(planned, folder, ranks, signals=signals)
    except Preempted as stop:
        (folder.path / f"stop-{ranks.rank}").write_text(f"{stop}; {stop.if_repeated}")


def main(recipe: Path, folder: Path) -> NoReturn:
    ranks = join_ranks(1)
    settings = ["pretrain.steps=8", "pretrain.checkpoint.every_steps=100", "evaluation.every_steps=4"]
    planned = plan_stage(load_recipe(recipe, settings), "pretrain", ranks.world_size)
    assert isinstance(planned, TrainPlan)
    train_here(planned, RunFolder(folder / "undisturbed"), ranks)
    stopped = RunFolder(folder / "stopped")
    stopped_at(0, stopped, planned, ranks)
    stopped_at(1, stopped, planned, ranks)
    train_here(planned, stopped, ranks)
    saving = plan_stage(load_recipe(recipe, ["pretrain.checkpoint.every_steps=2"]), "pretrain", ranks.world_size)
    assert isinstance(saving, TrainPlan)
    for name, time_left in (("in_time", True), ("late", False)):
        # The rank that knows the limit is not the leader.
        with patch.object(StopRequests, "time_for_a_save", time_left or ranks.rank == 0):
            stopped_with_a_save_in_flight(RunFolder(folder / name), saving, ranks)
    failed_alone(RunFolder(folder / "failed"), planned, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
