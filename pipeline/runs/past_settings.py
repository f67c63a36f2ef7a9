"""The settings of a training stage by its steps, as its run folder records them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage
from pipeline.runs.run_folder import run_folder
from pipeline.runs.settings_history import NO_CHANGES, SettingsHistory, settings_as_of
from pipeline.runs.stage_settings import may_change

if TYPE_CHECKING:
    from pipeline.recipe.schema import Recipe


def recorded_history(recipe: "Recipe", name: str) -> SettingsHistory:
    """The history of the settings of stage `name` in its run folder.

    Raises:
        ConfigError: the settings of now are not those of the recipe; or the record is damaged.
    """
    folder = run_folder(recipe, name)
    frozen = folder.frozen()
    if frozen is None or frozen.changes is None:
        return NO_CHANGES
    folder.check_settings(recipe)
    return frozen.changes


def stages_of_history(
    stage: TrainStage, history: SettingsHistory, where: str
) -> Iterator[tuple[TrainStage, int | None]]:
    """The settings of a stage in their order, and the number of steps after which each ends; None for those of now.

    What may change between any two starts is everywhere as in `stage`, the settings of now.

    Raises:
        ConfigError: settings of the past contradict those of now.
    """
    now = stage.model_dump(mode="json")
    for change in history.entries:
        try:
            past = TrainStage.model_validate(settings_as_of(change.settings, now, may_change))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"{where}the settings before step {change.step:,} do not work with those of now: {reason}"
            ) from None
        yield past, change.step
    yield stage, None
