"""What a stage starts from, fitted to its model: for its ranks, and checked beforehand from headers alone."""

from pathlib import Path

from data.remote.storage import Storage
from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.initial_weights.fitting import Fitted, adapted, fit
from pipeline.initial_weights.opening import open_source
from pipeline.initial_weights.source import Request
from pipeline.plan import Plan, TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import Stage
from pipeline.runs.announcements import StartingWeights
from pipeline.runs.run_folder import RunFolder, relative_location


def fitted_start(
    plan: Plan,
    location: str,
    folder: RunFolder,
    model: CoAtNet,
    ranks: Ranks | None = None,
    scratch: Path | None = None,
) -> Fitted:
    """The weights at `location` fitted to `model`; see `open_source`.

    Args:
        plan: of the stage that starts.
        location: the final checkpoint of its earlier stage, or its `start_source`.
        folder: its run folder.
        model: its model.
        ranks: all of them, or None to read headers alone.
        scratch: folder for downloads.

    Raises:
        ConfigError: there are no such weights, they are damaged, or do not fit.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    source = open_source(_request(plan.stage, location, folder, model), ranks, scratch)
    return fit(source, model, plan.classes, relative_location(source.location, folder))


def openable_start(stage: Stage, folder: RunFolder) -> str | None:
    """What the `start_source` of a stage is, as far as that can be told before its classes are known; None without one.

    Raises:
        ConfigError, StorageDown, StorageRefused: as for `fitted_start`.
    """
    if stage.start_source is None:
        return None
    model = create_model(stage.model.name, image_size=stage.resolution, device="meta", **stage.model.options)
    source = open_source(_request(stage, stage.start_source, folder, model))
    adapted(source, model)
    which = "the moving average of the weights" if source.weights == "ema" else "the raw weights"
    return f"{which} in {source.location}, of {source.origin}"


def checked_start(plan: Plan, folder: RunFolder) -> StartingWeights | None:
    """What the stage will take from its `start_source`, from the headers there; None if it has none.

    Raises:
        ConfigError, StorageDown, StorageRefused: as for `fitted_start`; also a stage that evaluates a model that was
            trained for other classes.
    """
    source = plan.stage.start_source
    if source is None:
        return None
    model = create_model(**plan.model_arguments, device="meta")
    fitted = fitted_start(plan, source, folder, model)
    if not isinstance(plan, TrainPlan):
        fitted.fill(model)
    return fitted.beginning


def _request(stage: Stage, location: str, folder: RunFolder, model: CoAtNet) -> Request:
    return Request(
        location=location,
        which=stage.start_weights,
        storage=Storage(**stage.data.storage.model_dump()),
        model=model,
        model_name=stage.model.name,
        earlier=folder.beside(stage.start_stage) if stage.start_stage else None,
    )
