"""One rank of the ZeRO tests: `python zero_worker.py RECIPE FOLDER CASE...`.

A case is STAGE-PRECISION, then -recomputed for activation checkpointing or -compiled, then -from-CASE.

For each case, six steps into FOLDER/CASE-whole, and again into FOLDER/CASE from the checkpoint of step 3 of that run or
of the case named. FOLDER/CASE-again has that checkpoint loaded and saved again without a step between.
"""

import shutil
import sys
from functools import partialmethod
from pathlib import Path

from rich.console import Console

from jobs.outcome import end_process
from models.coatnet import CoAtNet
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.place import checkpoint_place
from pipeline.checkpoints.saver import Saver
from pipeline.distributed import Ranks, join_ranks
from pipeline.engine import build_engine
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe_file import load_recipe
from pipeline.run_folder import RunFolder
from pipeline.state import TrainingState
from pipeline.stopping import StopRequests, StopSignals
from pipeline.train import train
from pipeline.watchdog import Watchdog
from pipeline.weights import build_model

COMPILE_BLOCKS = CoAtNet.compile_blocks


def plan(recipe: str, case: str, ranks: Ranks) -> TrainPlan:
    stage, precision = case.split("-")[:2]
    changes = [f"zero_stage={stage}", f"precision={precision}", "pretrain.steps=6", "pretrain.checkpoint.every_steps=3"]
    if "recomputed" in case:
        changes.append("activation_checkpointing=every_block")
    if "compiled" in case:
        # Traced and differentiated ahead of time as for real; writing and compiling C++ would take minutes on a CPU.
        CoAtNet.compile_blocks = partialmethod(COMPILE_BLOCKS, backend="aot_eager")  # type: ignore[method-assign]
        changes.append("compile=true")
    planned = plan_stage(load_recipe(Path(recipe), changes), "pretrain", ranks.world_size)
    assert isinstance(planned, TrainPlan)
    return planned


def run(planned: TrainPlan, folder: RunFolder, ranks: Ranks) -> None:
    """Train with nobody to ask for a stop."""
    watchdog = Watchdog(planned.stage.watchdog, ranks.rank, ranks.world_size, folder.log_file(ranks.rank), end_process)
    requests = StopRequests(StopSignals(end_process), planned.stage.checkpoint.grace_seconds)
    train(planned, folder, None, ranks, Console() if ranks.leads else None, requests, watchdog)


def save_again(planned: TrainPlan, checkpoint: Path, path: Path, ranks: Ranks) -> None:
    model = build_model(planned)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    state = TrainingState(build_engine(model, planned.stage, ranks), shapes, ranks)
    state.load(open_checkpoint(checkpoint))
    run, stage = RunFolder(path), planned.stage
    with Saver(checkpoint_place(run, stage), run, stage.checkpoint, ranks) as saver:
        saver.save(state.live({"step": 3}))
        saver.finish_whole()


def main(recipe: str, folder: Path, cases: list[str]) -> None:
    ranks = join_ranks(1)
    for case in cases:
        before = folder / f"{case.partition('-from-')[2] or case}-whole"
        if not before.exists():
            run(plan(recipe, case, ranks), RunFolder(before), ranks)
        if ranks.leads:
            (folder / case / "checkpoints").mkdir(parents=True)
            shutil.copytree(before / "checkpoints/step-00000003", folder / case / "checkpoints/step-00000003")
        ranks.barrier()
        planned = plan(recipe, case, ranks)
        save_again(planned, before / "checkpoints/step-00000003", folder / f"{case}-again", ranks)
        run(planned, RunFolder(folder / case), ranks)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
