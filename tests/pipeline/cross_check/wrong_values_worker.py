"""One rank of the tests of ranks that compute wrong values: `python wrong_values_worker.py RECIPE FOLDER`.

Trains three steps of each case into FOLDER/NAME, with a check and a save in every step, in as many starts as the case has.
A start that fails leaves its exit code, nodes and message in FOLDER/NAME/failed-START-RANK. FOLDER/undisturbed has neither
checks nor faults.
"""

import json
import sys
from pathlib import Path

from pipeline.errors import MachineFaulty, RunFailed
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import join_ranks, leave_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from tests.support.training import train_here
from tests.support.wrong_values import FOREVER, Fault, strike

MICRO_SIZE = {1: 6, 2: 3, 3: 2, 4: 3}
"""By number of ranks; of 12 samples."""
ZERO_STAGE = {1: 0, 2: 1, 3: 2, 4: 3}
BLOCK, HEAD = "blocks.0.expand.weight", "head.classifier.weight"
SETTINGS = [
    "pretrain.steps=3", "pretrain.optimizer.warmup_steps=1", "pretrain.checkpoint.every_steps=1",
    "pretrain.checkpoint.keep_last=9",
]  # fmt: skip


def computation(world: int, step: int, own: int | None = 0) -> int:
    """The number of a computation of a rank: its neighbour's in `step`, from 0, if `own` is None, or one of its own."""
    rounds = 12 // MICRO_SIZE[world] // world
    return step * (1 + rounds) + (0 if own is None else 1 + own)


def once(world: int, rank: int, kind: str, step: int = 1, own: int | None = 0) -> Fault:
    """A fault in one computation."""
    return Fault(rank, kind, computation(world, step, own), computation(world, step, own))


def always(world: int, rank: int, kind: str, step: int = 1) -> Fault:
    """A fault from `step` on."""
    return Fault(rank, kind, computation(world, step, None), FOREVER)


CASES: dict[int, dict[str, list[list[Fault]]]] = {
    1: {"own": [[once(1, 0, BLOCK)]], "none": [[]]},
    2: {
        "own": [[once(2, 1, BLOCK)]],
        "neighbours": [[once(2, 1, BLOCK, own=None)]],
        "always": [[always(2, 1, BLOCK)], []],
        "both": [[once(2, 0, HEAD), once(2, 1, HEAD)]],
    },
    3: {
        "own": [[once(3, 1, BLOCK)]],
        "neighbours": [[once(3, 1, BLOCK, own=None)]],
        "loss": [[once(3, 2, "loss")]],
        "statistics": [[once(3, 0, "statistics")]],
        # The rank that has to decide is wrong as well, in its first computation after the step.
        "undecided": [[once(3, 1, BLOCK), once(3, 2, HEAD, step=2, own=None)]],
        "limit": [[always(3, 1, HEAD, step=0)], [always(3, 1, HEAD, step=0)], [always(3, 2, HEAD, step=0)]],
    },
    4: {"always": [[always(4, 2, HEAD)], []]},
}  # fmt: skip
"""By number of ranks and name: the faults of each start."""


def main(recipe: Path, folder: Path) -> None:
    ranks = join_ranks(1)
    world = ranks.world_size
    cases: dict[str, list[list[Fault]]] = {"undisturbed": [[]], **CASES[world]}
    for name, starts in cases.items():
        checks = [] if name == "undisturbed" else ["verify={every_steps: 1, excluded_nodes: 1}"]
        sizes = [f"batch.micro_size={MICRO_SIZE[world]}", f"pretrain.zero_stage={ZERO_STAGE[world]}"]
        planned = plan_stage(load_recipe(recipe, [*SETTINGS, *sizes, *checks]), "pretrain", world)
        assert isinstance(planned, TrainPlan)
        run = RunFolder(folder / name)
        run.create()
        for number, faults in enumerate(starts):
            strike(*faults)
            try:
                train_here(planned, run, ranks, node=f"node-{ranks.rank}")
            except (MachineFaulty, RunFailed) as error:
                facts = [error.exit_code, getattr(error, "nodes", None), str(error)]
                (run.path / f"failed-{number}-{ranks.rank}").write_text(json.dumps(facts))
            ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_ranks()
