"""The section `data` of a recipe: shards, storage, cache, views and augmentation, each with its checks."""

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from data.files.user_account import account_name, temporary_folder
from data.images.random_erasing import ErasingMode
from pipeline.recipe.locations import CachePath, LabelMapPath, PathOrUrl, ServerUrl
from pipeline.recipe.section import MayChange, Pair, PositiveInt, Section


class StorageSettings(Section):
    """How remote shards are reached; what is not set comes from the usual AWS variables and files."""

    endpoint: ServerUrl | None = None
    """URL of an S3 server other than Amazon's."""
    profile: str | None = None
    """Profile in the AWS credentials file."""
    anonymous: bool = False
    """Send requests without credentials."""
    give_up_after: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without an answer after which the run stops; the same command continues it later."""
    requester_pays: bool = False
    """Agree to pay for the requests to S3 buckets whose owners do not."""
    shards_elsewhere: bool = False
    """Read shards that a remote index names outside of its own folder; only if you trust whoever wrote the index."""


class CacheSettings(Section):
    """Where each node caches remote shards; all its ranks share the folder."""

    folder: CachePath = f"{temporary_folder()}/coatnet-shards-{account_name()}"
    """On a local disk of the node."""
    gigabytes: Annotated[float, Field(gt=0)] = 100.0
    """Maximum size of the cache."""
    downloads: Annotated[int, Field(gt=0, le=64)] = 8
    """Shards downloaded at a time."""


class RandomAugmentSettings(Section):
    """RandAugment on the magnitude scale of the EfficientNet code, which the CoAtNet paper uses."""

    layers: PositiveInt
    """Consecutive operations on each training image."""
    magnitude: Annotated[float, Field(ge=0, le=30)]
    """Strength of the operations: 15 rotates by 45 degrees."""
    # Left out of a frozen recipe at its default, so that digests of runs without the setting stay what they were.
    operations: Annotated[Literal["pillow", "efficientnet"], Field(exclude_if=lambda kind: kind == "pillow")] = "pillow"
    """Contrast and solarize as in Pillow, or as in the EfficientNet code, where they do something else."""


class ColorJitterSettings(Section):
    """torchvision's ColorJitter; 0 leaves a change out."""

    brightness: Annotated[float, Field(ge=0)] = 0.0
    """Levels times 1 - brightness to 1 + brightness, at least 0."""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """The same for distances from the mean grey."""
    saturation: Annotated[float, Field(ge=0)] = 0.0
    """The same for distances from a pixel's grey."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the hue, as a share of the circle."""


class RandomErasingSettings(Section):
    """timm's RandomErasing."""

    probability: Annotated[float, Field(ge=0, le=1)]
    """That something of an image is erased."""
    mode: ErasingMode = "pixel"
    """With the mean color, with a random color for each rectangle, or with one for each pixel."""
    max_count: PositiveInt = 1
    """Rectangles of an image; their number is drawn from 1 to this, and their area is divided by it."""


class DataSettings(Section):
    """Where samples come from, their order, and how images are cropped and augmented."""

    train: MayChange[PathOrUrl | None] = None
    """Folder of training shards, a path or a URL. Relative paths start at the recipe's folder."""
    validation: MayChange[PathOrUrl]
    """Folder of evaluation shards, a path or a URL."""
    label_map: MayChange[LabelMapPath | None] = None
    """File that renames, merges or drops classes of the training shards."""
    validation_label_map: MayChange[LabelMapPath | None] = None
    """The same for the evaluation shards."""
    storage: MayChange[StorageSettings] = StorageSettings()
    cache: MayChange[CacheSettings] = CacheSettings()
    lanes: PositiveInt | None = None
    """Streams that a global batch is drawn from; must divide the global batch size. None: its greatest divisor up to
    64, or up to the number of samples."""
    shuffle_window: PositiveInt = 8192
    """Samples that are shuffled among each other within a lane, up to a quarter more at the ends of an epoch."""
    crop: Literal["random", "distorted_bounding_box", "whole"] = "random"
    """Training view: a random window with its area or with its height drawn uniformly, or the whole image resized."""
    crop_area: Pair = (0.05, 1.0)
    """Minimum and maximum share of the image area that a random window covers."""
    flip: bool = True
    """Mirror half of the training images."""
    random_augment: RandomAugmentSettings | None = None
    """RandAugment after crop and flip; None for none."""
    # Left out of a frozen recipe without them, so that digests of runs without them stay what they were.
    color_jitter: Annotated[ColorJitterSettings | None, Field(exclude_if=lambda section: section is None)] = None
    """Random brightness, contrast, saturation and hue after RandAugment; None for none."""
    random_erasing: Annotated[RandomErasingSettings | None, Field(exclude_if=lambda section: section is None)] = None
    """Random erasing of the normalized image; None for none."""
    excluded_samples: Annotated[tuple[str, ...], Strict(False), Field(exclude_if=lambda names: not names)] = ()
    """Training samples to leave out, as `shard/key`; each is replaced by another one of its shard."""
    evaluation_crop: Literal["center", "whole"] = "center"
    """Evaluation view: the central S / (S + 32), or the whole image resized; a stage below 160 pixels has `whole` by
    default."""
    skipped_share: MayChange[Annotated[float, Field(ge=0, le=1)]] = 0.001
    """The run stops when more than this share of the samples read since its start is unusable."""
    skipped_run: MayChange[PositiveInt] = 32
    """The run stops when a rank reads more than this many unusable samples in a row."""
    verify_shards: MayChange[bool] = True
    """Hash local shards behind the run and compare them with the index; remote ones are always verified."""
    workers: MayChange[PositiveInt] = 4
    """Reader threads of each rank."""

    @model_validator(mode="after")
    def _area_is_a_range(self) -> Self:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError("crop_area: must be two shares of the image area, 0 < minimum <= maximum <= 1")
        return self
