"""The sections of a stage that say when something happens during training: saves, evaluations, log lines."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.recipe.locations import PathOrUrl
from pipeline.recipe.section import PositiveInt, Section, WhichWeights

_SAVE_EVERY = 1000  # steps


class CheckpointSettings(Section):
    """When and where checkpoints are saved, and which are kept."""

    every_steps: PositiveInt | None = None
    """Steps between saves, by default 1000; the last step is always saved."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between saves; an alternative to `every_steps`."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose steps are multiples of this are kept permanently."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of checkpoints to keep with the best top-1 in an evaluation at their step."""
    folder: PathOrUrl | None = None
    """A path or URL below which `<recipe>/<stage>/step-...` is stored, instead of the run folder."""
    grace_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds after a stop signal after which the run ends even if its save is not complete."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        _refuse_two_intervals(self)
        return self

    @property
    def interval(self) -> int:
        """Steps between saves; where the recipe has epochs, only a plan knows them."""
        return self.every_steps or _SAVE_EVERY


class EvaluationSettings(Section):
    """When a training stage evaluates, and which weights; it always evaluates at its end."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations, by default about a tenth of the stage."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between evaluations; an alternative to `every_steps`."""
    weights: WhichWeights = "auto"
    """`raw`, `ema`, or `auto`: the moving average if there is one."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        _refuse_two_intervals(self)
        return self


class LogSettings(Section):
    """What is logged during training."""

    every_steps: PositiveInt = 10
    """Steps between log lines and TensorBoard points."""
    samples: bool = False
    """Whether each rank records which samples it was trained on."""
    histograms_every_steps: PositiveInt | None = None
    """Steps between histograms of the weights; a file `histograms` in the run folder requests one."""


def _refuse_two_intervals(settings: CheckpointSettings | EvaluationSettings) -> None:
    if settings.every_steps is not None and settings.every_epochs is not None:
        raise ValueError("every_steps and every_epochs are both given; keep one (null removes the other)")
