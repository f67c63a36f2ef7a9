"""A stage that is done, and whose final checkpoint no longer exists: what is said, and what is there instead."""

from collections.abc import Iterator

from data.errors import CoatnetError, raise_if_passing
from pipeline.checkpoints.listing import CheckpointedStage, checkpointed_stage, list_checkpoints, stage_of_recipe
from pipeline.checkpoints.manifest import manifest_bytes
from pipeline.checkpoints.verification import find_damage
from pipeline.errors import ConfigError
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.run_folder import RunFolder, absolute_location, run_folder


def check_final_checkpoint(recipe: Recipe, name: str) -> str:
    """Refuse to take the training stage `name` for done if its final checkpoint no longer exists and is still needed.

    It is not if every stage that starts from it is done or has checkpoints of its own; returns a remark about it then,
    else nothing.

    Raises:
        ConfigError: it no longer exists; the message names the newest intact one.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    if isinstance(recipe.stages[name], TrainStage) and run_folder(recipe, name).result() is not None:
        stage = stage_of_recipe(recipe, name)
        if _is_lost(stage):
            if not _is_behind(recipe, name):
                raise _lost(stage)
            return "its checkpoint no longer exists, and no other stage needs it any more"
    return ""


def continues_alone(recipe: Recipe, name: str) -> bool:
    """Whether stage `name` no longer needs the checkpoint that it starts from: it is done, or has some of its own.

    Raises:
        ConfigError: a record of it is damaged.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    folder = run_folder(recipe, name)
    if folder.result() is not None:
        return True
    if not isinstance(recipe.stages[name], TrainStage) or not folder.recipe.exists():
        return False
    return any(store.contents().steps for store in stage_of_recipe(recipe, name).stores)


def is_left_behind(recipe: Recipe, name: str) -> bool:
    """Whether the run folder of stage `name` is gone, and what is left to do of the recipe does not need it.

    Raises:
        ConfigError, StorageDown, StorageRefused: as for `continues_alone`.
    """
    others = [other for other in recipe.stages if other != name]
    return (
        not run_folder(recipe, name).recipe.exists()
        and any(run_folder(recipe, other).result() is None for other in others)
        and _is_behind(recipe, name)
    )


def _is_behind(recipe: Recipe, name: str) -> bool:
    """Whether the weights of a stage live on in others that are trained from them, and none has to read them again."""
    after = {other: stage for other, stage in recipe.stages.items() if stage.start_from == name}
    trained = any(isinstance(stage, TrainStage) for stage in after.values())
    return trained and all(continues_alone(recipe, other) for other in after)


def refuse_lost_checkpoint(stage: CheckpointedStage) -> None:
    """The same for a stage that is done, whoever needs it.

    Raises:
        ConfigError, StorageDown, StorageRefused: as for `check_final_checkpoint`.
    """
    if _is_lost(stage):
        raise _lost(stage)


def lost_in(folder: RunFolder) -> str:
    """That the final checkpoint of the stage in `folder` is gone, and which is the newest there; hashing takes too long
    for someone who waits for the answer."""
    try:
        stage = checkpointed_stage(folder)
        newest = next(_others(stage), None) if stage else None
    except (CoatnetError, OSError) as error:
        return f"its checkpoint no longer exists ({error})"
    return (
        f"its checkpoint no longer exists, the newest one there is {newest}"
        if newest
        else "its checkpoint no longer exists"
    )


def _is_lost(stage: CheckpointedStage) -> bool:
    try:
        manifest_bytes(_final(stage), stage.stores[0].storage)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise_if_passing(error)  # otherwise it is damaged, as opening it will say
    return False


def _lost(stage: CheckpointedStage) -> ConfigError:
    """The error for a final checkpoint that is lost; only now are others looked for, and hashed."""
    storage = stage.stores[0].storage
    newest = next((found for found in _others(stage) if find_damage(found, storage) is None), None)
    there, again = "and there is no other intact one", f"remove {stage.folder.path} to train the stage again"
    if newest:
        there = f"the newest intact one is {newest}"
        again = f"remove {stage.folder.path / 'result.json'} to continue from that one"
    return ConfigError(
        f"stage {stage.stage}: done, but its checkpoint {_final(stage)} no longer exists, {there}; "
        f"restore it, or {again}"
    )


def _final(stage: CheckpointedStage) -> str:
    result = stage.folder.result()
    assert result is not None
    return absolute_location(result.checkpoint, stage.folder)


def _others(stage: CheckpointedStage) -> Iterator[str]:
    """Paths or URLs of the checkpoints whose manifests and file sizes are right, newest first."""
    found = [one for one in list_checkpoints(stage) if one.state == "published" and one.problem is None]
    for one in sorted(found, key=lambda one: one.step or 0, reverse=True):
        yield one.location
