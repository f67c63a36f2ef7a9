"""One rank of the tests of non-finite steps: `python non_finite_worker.py RECIPE FOLDER`.

Trains ten steps, or as many as it says, into FOLDER/NAME for each case below. The images of one micro-batch of some
steps are set to NaN, which no image in a shard can contain; everything after that is the real code. During other steps
rank 1 alone is asked to stop; the next start continues.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline.training.step
from pipeline.errors import Preempted, RunFailed
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import join_ranks, leave_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from pipeline.training.step import StepResult
from pipeline.training.training_run import TrainingRun
from tests.support.training import train_here

TWICE = [6, 7, 8, 9, 10, 11]
KEEPING_TWO = [
    "pretrain.steps=14",
    "non_finite.in_a_row=3",
    "non_finite.roll_backs=2",
    "pretrain.checkpoint.keep_last=2",
]
CASES: dict[str, tuple[list[int], list[int], list[str]]] = {
    "last": ([9], [], ["pretrain.checkpoint.every_steps=3"]),
    "too_many": ([4, 5, 6], [], ["non_finite.in_a_row=3"]),
    "rolled_back": ([5, 6, 7], [], ["non_finite.in_a_row=3", "non_finite.roll_backs=1"]),
    "again": ([3, 4, 5, 7, 8, 9], [], ["non_finite.in_a_row=3", "non_finite.roll_backs=1"]),
    "twice": (TWICE, [], KEEPING_TWO),
    # Before the first series, twice in it, and in the second one.
    "twice_stopped": (TWICE, [4, 6, 7, 10], KEEPING_TWO),
}
"""By name: the steps (from 0) that contain NaN, those during which a signal arrives, and settings."""
BROKEN_MICRO_BATCH = 2  # of four: the first of rank 1

inputs, real_step = pipeline.training.step.prepared_inputs, TrainingRun.take_step  # type: ignore[attr-defined]


def broken_in(steps: list[int]) -> Any:
    def broken(batch: Any, plan: TrainPlan, step: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images, targets = inputs(batch, plan, step, number, device)
        return (images * torch.nan if step in steps and number == BROKEN_MICRO_BATCH else images), targets

    return broken


def stopped_in(steps: list[int]) -> Any:
    def take_step(run: TrainingRun) -> StepResult:
        if run.step in steps and run.context.ranks.rank == 1:
            run.context.requests._received(signal.SIGTERM)
        return real_step(run)

    return take_step


def main(recipe: Path, folder: Path) -> None:
    ranks = join_ranks(1)
    for name, (steps, stops, settings) in CASES.items():
        pipeline.training.step.prepared_inputs = broken_in(steps)  # type: ignore[attr-defined]
        TrainingRun.take_step = stopped_in(stops)  # type: ignore[method-assign]
        saves = ["pretrain.checkpoint.every_steps=2", "pretrain.checkpoint.keep_last=9"]
        planned = plan_stage(
            load_recipe(recipe, ["pretrain.steps=10", *saves, *settings]), "pretrain", ranks.world_size
        )
        assert isinstance(planned, TrainPlan)
        run = RunFolder(folder / name)
        run.create()
        for _ in range(len(stops) + 1):
            try:
                train_here(planned, run, ranks)
            except RunFailed as error:
                (run.path / f"failed-{ranks.rank}").write_text(str(error))
            except Preempted:
                pass
            ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_ranks()
