"""One rank that saves checkpoints: `python saving_worker.py FOLDER CASE...`, a case being STAGE-PRECISION.

For each case the state of an untrained small model goes to FOLDER/CASE/checkpoints/step-00000001, and what each rank holds
of it to FOLDER/CASE/held-RANK.json.
"""

import json
import sys
from pathlib import Path

from data.remote.storage import Storage
from models.registry import create_model
from pipeline.checkpoints.manifest import NonFiniteRecord
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.recipe.schema import TrainStage
from pipeline.rehearsal.engine_on_fake_tensors import _weights
from pipeline.runs.run_folder import RunFolder
from pipeline.training.training_state import TrainingState
from pipeline.zero.engine import build_engine
from tests.support.records import RUN

CLASSES = 3


def stage_of(case: str, ranks: int) -> TrainStage:
    """A small stage with the ZeRO stage and precision of a case; those of ZeRO 1 keep a moving average."""
    zero_stage, precision = case.split("-")
    return TrainStage.model_validate(
        {
            "resolution": 32,
            "steps": 2,
            "data": {"train": "none", "validation": "none"},
            "model": {"name": "coatnet_debug"},
            "batch": {"global_size": 4 * ranks, "micro_size": 2},
            "precision": precision,
            "zero_stage": int(zero_stage),
            "ema_decay": 0.9 if zero_stage == "1" else None,
            "optimizer": {"peak_learning_rate": 1e-3},
            "resources": {"ranks": ranks},
        }
    )


def save(case: str, folder: Path, ranks: Ranks) -> None:
    stage = stage_of(case, ranks.world_size)
    model = create_model("coatnet_debug", num_classes=CLASSES, image_size=32)
    engine = build_engine(model, stage, ranks)
    state = TrainingState(engine, ranks, stage.ema_decay)
    live = state.live(RUN, 1, 4 * ranks.world_size, 0, NonFiniteRecord(), classes=("a", "b", "c"))
    run = folder / case
    run.mkdir(exist_ok=True)
    store = CheckpointStore(str(run / "checkpoints"), Storage(), run / "checkpoints")
    with Saver(store, RunFolder(run), CheckpointSettings(), ranks) as saver:
        saver.save(live)
        assert saver.finish()
    held = {"masters": sum(master.numel() for master in engine.masters), "weights": _weights(model)[0]}
    (run / f"held-{ranks.rank}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    ranks = join_ranks(1)
    for case in sys.argv[2:]:
        save(case, Path(sys.argv[1]), ranks)
    leave_ranks()
