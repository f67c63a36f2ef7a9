"""How much a stage trains on: from the index of its shards, or from what is known of public datasets."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, StorageDown
from pipeline.errors import ConfigError
from pipeline.plan import open_stage_dataset
from pipeline.planner.hardware import bundled_hardware, figure_range
from pipeline.planner.ranges import Range
from pipeline.recipe.schema import TrainStage

_INDEX_SECONDS = 10.0  # for the index of remote shards
_SAMPLES_PER_SHARD = 4096  # as `shards build` writes at most

KNOWN: dict[str, tuple[int, int]] = {
    "in1k": (1_281_167, 1_000),
    "in21k": (12_720_275, 21_843),
    # The papers print rounded numbers: "300M" images with 18 thousand classes, "3B" with 30 thousand.
    "jft": (300_000_000, 18_000),
    "jft3b": (3_000_000_000, 30_000),
}
"""Training samples and classes by the name of the folder that has the shards, for a plan before they exist."""


@dataclass(frozen=True, slots=True)
class PlannedDataset:
    """What a stage trains on."""

    samples: int
    classes: int
    shards: int
    image_bytes: Range
    """Of a sample in its shard."""
    source: str
    """Where this is from, in words."""
    is_assumed: bool = False
    """Whether there is no index."""


def planned_dataset(stage: TrainStage, samples: int | None = None, classes: int | None = None) -> PlannedDataset:
    """The training data of `stage`; `samples` and `classes` replace what is found.

    Raises:
        ConfigError: there is no index that can be read, and the folder has none of the names in `KNOWN`; or the samples
            have several classes, and the loss takes one.
    """
    storage = stage.data.storage
    quick = storage.model_copy(update={"give_up_after": min(storage.give_up_after, _INDEX_SECONDS)})
    asked = stage.model_copy(update={"data": stage.data.model_copy(update={"storage": quick})})
    try:
        found = open_stage_dataset(asked, "train", "")
    except (DataError, StorageDown) as error:
        return _without_index(stage, samples, classes, error)
    total = sum(shard.bytes for shard in found.index.shards)
    size = total / max(1, int(found.index.shard_samples.sum()))
    given = samples is not None or classes is not None
    return PlannedDataset(
        samples=samples or found.samples,
        classes=classes or len(found.classes),
        shards=len(found.index.shards),
        image_bytes=Range.exactly(size),
        source=f"the index of {stage.data.train}" + (", and what was given" if given else ""),
    )


def _without_index(
    stage: TrainStage, samples: int | None, classes: int | None, error: DataError | StorageDown
) -> PlannedDataset:
    folder = stage.data.train or ""
    known = KNOWN.get(Path(folder).parent.name) or KNOWN.get(Path(folder).name)
    if known is None and (samples is None or classes is None):
        raise ConfigError(
            f"data.train: the number of samples and classes of {folder} is not known, since {error}; give them by "
            "--samples and --classes"
        ) from None
    usual = known or (0, 0)
    count = samples or usual[0]
    source = f"assumed by its name, since {str(error).partition(';')[0]}"
    if samples and classes:
        source = "as given"
    elif samples or classes:
        source += ", and as given"
    return PlannedDataset(
        samples=count,
        classes=classes or usual[1],
        shards=-(-count // _SAMPLES_PER_SHARD),
        image_bytes=figure_range(bundled_hardware().law.image_bytes),
        source=source,
        is_assumed=True,
    )
