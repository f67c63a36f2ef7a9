"""A stage that is done, and whose final checkpoint no longer exists: what is said, and what is there instead."""

from collections.abc import Iterator

from data.errors import CoatnetError
from data.remote.storage import join, read_bytes
from pipeline.checkpoints.listing import CheckpointedStage, checkpointed_stage, list_checkpoints, stage_of_recipe
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.checkpoints.verification import find_damage
from pipeline.errors import ConfigError
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.run_folder import RunFolder, absolute_location, run_folder


def check_final_checkpoint(recipe: Recipe, name: str) -> None:
    """Refuse to take the training stage `name` for done if its final checkpoint no longer exists.

    Raises:
        ConfigError: it does not; the message names the newest intact one.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    stage = recipe.stages[name]
    if isinstance(stage, TrainStage) and run_folder(recipe, name).result() is not None:
        refuse_lost_checkpoint(stage_of_recipe(recipe, name))


def refuse_lost_checkpoint(stage: CheckpointedStage) -> None:
    """The same for a stage that is done. Others are only looked for, and hashed, if it is lost.

    Raises:
        ConfigError, StorageDown, StorageRefused: as for `check_final_checkpoint`.
    """
    location, storage = _final(stage), stage.stores[0].storage
    try:
        read_bytes(join(location, MANIFEST), storage)
    except FileNotFoundError:
        newest = next((found for found in _others(stage) if find_damage(found, storage) is None), None)
        there, again = "and there is no other intact one", f"remove {stage.folder.path} to train the stage again"
        if newest:
            there = f"the newest intact one is {newest}"
            again = f"remove {stage.folder.path / 'result.json'} to continue from that one"
        raise ConfigError(
            f"stage {stage.stage}: done, but its checkpoint {location} no longer exists, {there}; "
            f"restore it, or {again}"
        ) from None


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


def _final(stage: CheckpointedStage) -> str:
    result = stage.folder.result()
    assert result is not None
    return absolute_location(result.checkpoint, stage.folder)


def _others(stage: CheckpointedStage) -> Iterator[str]:
    """Paths or URLs of the checkpoints whose manifests and file sizes are right, newest first."""
    found = [one for one in list_checkpoints(stage) if one.state == "published" and one.problem is None]
    for one in sorted(found, key=lambda one: one.step or 0, reverse=True):
        yield one.location
