"""Whether existing shards are those that the section `shards` of a recipe describes."""

from pathlib import Path

from data.building.build_record import RECORD_NAME, differences, read_record, source_was_modified
from pipeline.errors import ConfigError
from pipeline.recipe.sections import ShardBuildSettings


def check_built(shards: ShardBuildSettings) -> str | None:
    """Check that existing shards were built from the source and with the options of the recipe.

    Returns:
        A doubt that remains, as `what; the fix`; None if there is none, or the shards have yet to be built.

    Raises:
        ConfigError: they were built from another source, with other options, or the source has changed since.
        DataError: their record is damaged.
    """
    folder = Path(shards.folder)
    if not folder.exists():
        return None
    record = read_record(folder)
    if record is None:
        return (
            f"shards: {folder} exists and is used, but whether it was built as the recipe says is not known "
            f"(it has no {RECORD_NAME}); leave the section shards out to use the folder as it is"
        )
    found = differences(record, folder, shards.source, shards.build_options)
    if found:
        listed = "\n  ".join(found)
        raise ConfigError(
            f"shards: {folder} was not built as the recipe says:\n  {listed}\n"
            "Name another shards.folder to build them anew, restore the old values, or leave the section shards out to "
            "use the folder as it is"
        )
    if source_was_modified(record, shards.source):
        return (
            f"shards: {shards.source} was modified after {folder} was built from it, so images may have come or gone; "
            "to build from it again, name another shards.folder"
        )
    return None
