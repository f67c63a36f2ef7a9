"""How long a save stops training: two checkpoints of the stage, written into a folder that is removed afterwards."""

import shutil
from pathlib import Path

from data.remote.storage import Storage
from models.complexity import count_parameters
from pipeline.checkpoints.manifest import NonFiniteRecord, RunFacts
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError, RunFailed
from pipeline.gpu_benchmark.record import Saves
from pipeline.gpu_benchmark.subject import MeasuredStage, join
from pipeline.gpu_benchmark.training_steps import Rank
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_settings import digests
from pipeline.state_bytes import checkpoint_bytes

_SAVES = 2


def measure_saves(subject: MeasuredStage, folder: Path) -> Saves:
    """Take a step before each save, and wait for its end before the next one. One rank saves the whole state.

    `folder` is that of a request, three levels below the one whose disk is written to.

    Raises:
        ConfigError: the disk of `folder` has too little room.
        RunFailed: a save failed.
    """
    plan = subject.plan()
    stage = plan.stage
    need = 2 * checkpoint_bytes(stage, count_parameters(stage.model.variant, stage.resolution, subject.classes))
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise ConfigError(
            f"{folder}: two checkpoints need {need / 1e9:.1f} GB and {free / 1e9:.1f} are free; name a folder on "
            "another disk with --scratch"
        )
    ranks = join(plan)
    rank = Rank(plan, ranks)
    run = RunFolder(folder)
    facts = RunFacts(plan.name, stage.precision, plan.model_arguments, digests(plan))
    store = CheckpointStore(str(run.checkpoints), Storage(), run.checkpoints)
    stalls, seconds, size = [], [], 0
    with Saver(store, run, CheckpointSettings(keep_last=1), ranks) as saver:
        for number in range(1, _SAVES + 1):
            rank.take_step()
            state = rank.state.live(facts, number, 0, 0, NonFiniteRecord(), classes=plan.classes)
            stalls.append(1e3 * saver.save(state))
            saver.finish()
            (report,) = saver.reports()
            if report.failure is not None:
                raise RunFailed(f"a save into {folder} failed: {report.failure}")
            seconds.append(report.seconds)
            size = report.bytes
    return Saves(size, tuple(stalls), tuple(seconds), str(folder.parents[2]))
