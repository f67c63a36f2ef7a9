"""Whether the model of a stage can be trained as the recipe says."""

from pipeline.errors import ConfigError
from pipeline.recipe.schema import Recipe, Stage
from pipeline.recipe.sections import ModelSettings


def check_model(recipe: Recipe, stage: Stage, where: str) -> None:
    """Check that the model exists, supports the resolution, and is that of the stage it starts from.

    Raises:
        ConfigError: one of these does not hold.
    """
    try:
        variant = stage.model.variant
    except ValueError as error:
        raise ConfigError(f"{where}model: {error}") from None
    if stage.resolution % variant.stride:
        lower = max(variant.stride, stage.resolution // variant.stride * variant.stride)
        raise ConfigError(
            f"{where}resolution: {stage.resolution} is no multiple of {variant.stride}, as {stage.model.name} needs; "
            f"{lower} is"
        )
    start = stage.start_stage
    if start is not None and recipe.stages[start].model.variant != variant:
        other = recipe.stages[start].model
        raise ConfigError(
            f"{where}model: {_described(stage.model)} cannot start from stage {start}, which trains "
            f"{_described(other)}; use one model"
        )


def _described(model: ModelSettings) -> str:
    options = ", ".join(f"{name} {value}" for name, value in model.options.items())
    return f"{model.name} ({options})" if options else model.name
