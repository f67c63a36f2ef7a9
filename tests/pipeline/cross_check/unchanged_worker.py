"""One rank of the test that checks change nothing: `python unchanged_worker.py RECIPE FOLDER`.

Trains three steps of each case below into FOLDER/NAME, and again with a check in every step into FOLDER/NAME-checked.
"""

import sys
from pathlib import Path

from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import join_ranks, leave_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from tests.support.training import train_here

EVERYTHING = ["mixup_alpha=0.2", "cutmix_alpha=1", "data.random_erasing={probability: 0.9}", "ema_decay=0.9"]
CASES = {
    "zero0": ["zero_stage=0", *EVERYTHING],
    "zero1_autocast": ["precision=bf16_autocast", "zero_stage=1", "activation_checkpointing=every_block"],
    "zero1_bf16": ["precision=bf16", "zero_stage=1", "batch.micro_size=6"],
    "zero2": ["zero_stage=2", "activation_checkpointing=mbconv", *EVERYTHING],
    "zero3_bf16": ["precision=bf16", "zero_stage=3"],
    "zero3_autocast": ["precision=bf16_autocast", "zero_stage=3", "activation_checkpointing=2"],
}
"""By name: settings. With two ranks and micro-batches of three samples, each rank accumulates two."""


def main(recipe: Path, folder: Path) -> None:
    ranks = join_ranks(1)
    for name, settings in CASES.items():
        for suffix, check in (("", []), ("-checked", ["verify.every_steps=1"])):
            planned = plan_stage(
                load_recipe(recipe, ["pretrain.steps=3", "pretrain.optimizer.warmup_steps=1", *settings, *check]),
                "pretrain",
                ranks.world_size,
            )
            assert isinstance(planned, TrainPlan)
            train_here(planned, RunFolder(folder / f"{name}{suffix}"), ranks)
            ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_ranks()
