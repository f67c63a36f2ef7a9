"""Which checkpoints a path means: those of the training stages that it names, or one checkpoint."""

from pathlib import Path

from data.remote.storage import is_remote
from jobs.bundled_recipes import load_recipe
from jobs.run_discovery import RunRef, find_runs
from pipeline.checkpoints.listing import CheckpointedStage, checkpointed_stage, stage_of_recipe
from pipeline.checkpoints.lost import refuse_lost_checkpoint
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage


def find_training_stages(target: Path) -> list[tuple[RunRef, CheckpointedStage]]:
    """The training stages at `target`, as for `find_runs`, with their runs.

    Raises:
        ConfigError: there are none.
    """
    runs = find_runs(target)
    if len(runs) == 1 and target.is_file() and not runs[0].settings:
        # Also stages that have yet to start on this machine.
        recipe = load_recipe(target)
        training = [name for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)]
        return [(runs[0], stage_of_recipe(recipe, name)) for name in training]
    folders = [(run, run.folder(name)) for run in runs for name in run.stages()]
    found = [(run, stage) for run, folder in folders if (stage := checkpointed_stage(folder))]
    if not found:
        raise ConfigError(f"{target}: no training stage has started here")
    return found


def find_checkpoint(source: str) -> str:
    """The path or URL of one checkpoint: `source` itself, or that of the stage there: of its result, or its newest.

    Raises:
        ConfigError: there is none, or there are several stages, or the one of the result no longer exists.
    """
    if is_remote(source) or (Path(source) / MANIFEST).exists():
        return source
    stages = find_training_stages(Path(source))
    if len(stages) > 1:
        names = ", ".join(stage.stage for _, stage in stages)
        raise ConfigError(f"{source}: has several stages ({names}); give the folder of one")
    stage = stages[0][1]
    if stage.folder.result() is not None:
        refuse_lost_checkpoint(stage)
    checkpoint = stage.final_or_newest()
    if checkpoint is None:
        raise ConfigError(f"{source}: no checkpoint yet; train the stage until it has saved one")
    return checkpoint
