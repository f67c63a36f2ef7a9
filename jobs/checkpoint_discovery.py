"""Which training stages a path names, and which trained model."""

from pathlib import Path

from data.remote.storage import is_remote
from jobs.bundled_recipes import load_recipe
from jobs.run_discovery import RunRef, find_runs
from pipeline.checkpoints.listing import CheckpointedStage, checkpointed_stage, stage_of_recipe
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


def model_location(source: str) -> str:
    """Where the trained model that a command names is: `source` itself or, for a recipe file, the folder of its run.

    Raises:
        ConfigError: the recipe is wrong, or its run has no folder yet.
    """
    path = Path(source)
    if is_remote(source) or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return source
    recipe = load_recipe(path)
    folder = Path(recipe.runs) / recipe.name
    if not folder.is_dir():
        raise ConfigError(f"{source}: has not run yet ({folder} does not exist); run it first")
    return str(folder)
