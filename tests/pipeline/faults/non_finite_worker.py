"""One rank of the tests of non-finite steps: `python non_finite_worker.py RECIPE FOLDER`.

Trains ten steps into FOLDER/NAME for each case below. The images of one micro-batch of some steps are set to NaN, which
no image in a shard can contain; everything after that is the real code.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline.step
from pipeline.distributed import join_ranks, leave_ranks
from pipeline.errors import RunFailed
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.run_folder import RunFolder
from tests.support.training import train_here

CASES: dict[str, tuple[list[int], list[str]]] = {
    "last": ([9], ["pretrain.checkpoint.every_steps=3"]),
    "too_many": ([4, 5, 6], ["non_finite.in_a_row=3"]),
    "rolled_back": ([5, 6, 7], ["non_finite.in_a_row=3", "non_finite.roll_backs=1"]),
    "again": ([3, 4, 5, 7, 8, 9], ["non_finite.in_a_row=3", "non_finite.roll_backs=1"]),
}
"""By name: the steps (from 0) that contain NaN, and settings."""
BROKEN_MICRO_BATCH = 2  # of four: the first of rank 1

inputs = pipeline.step._inputs


def broken_in(steps: list[int]) -> Any:
    def broken(batch: Any, plan: TrainPlan, step: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images, targets = inputs(batch, plan, step, number, device)
        return (images * torch.nan if step in steps and number == BROKEN_MICRO_BATCH else images), targets

    return broken


def main(recipe: Path, folder: Path) -> None:
    ranks = join_ranks(1)
    for name, (steps, settings) in CASES.items():
        pipeline.step._inputs = broken_in(steps)
        saves = ["pretrain.checkpoint.every_steps=2", "pretrain.checkpoint.keep_last=9"]
        planned = plan_stage(
            load_recipe(recipe, ["pretrain.steps=10", *saves, *settings]), "pretrain", ranks.world_size
        )
        assert isinstance(planned, TrainPlan)
        run = RunFolder(folder / name)
        run.create()
        try:
            train_here(planned, run, ranks)
        except RunFailed as error:
            (run.path / f"failed-{ranks.rank}").write_text(str(error))
        ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_ranks()
