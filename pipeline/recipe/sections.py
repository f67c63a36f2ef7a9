"""The sections of a stage in a recipe, each with its settings and their checks.

Defaults are the common choices of the published recipes, Table 10 of the CoAtNet paper.
"""

import math
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from data.files.user_account import account_name, temporary_folder
from data.images.random_erasing import ErasingMode
from models.options import BiasPlace, ConvolutionNorm, Gelu, Pooling, StridePlace
from models.variants import Variant, find_variant
from pipeline.recipe.locations import CachePath, ImageName, LabelMapPath, Mount, PathOrUrl, ServerUrl, ShardsPath
from pipeline.recipe.sbatch_flags import check_flag
from pipeline.recipe.time_limits import time_limit_seconds

PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
# YAML has lists and no tuples.
Numbers = Annotated[tuple[PositiveInt, ...], Strict(False)]
Pair = Annotated[tuple[Annotated[float, Strict()], Annotated[float, Strict()]], Strict(False)]
WhichWeights = Literal["auto", "raw", "ema"]


Setting = TypeVar("Setting")


class _MayChange:
    """Marks a setting that may change between two starts of a run: it decides where, how fast and how reliably the run
    is computed, and not what."""


MayChange = Annotated[Setting, _MayChange()]


class Section(BaseModel):
    """A part of a recipe; unknown keys and mistyped values are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def changeable_settings(section: type[Section]) -> frozenset[str]:
    """Dotted keys of the settings and sections below `section` that are declared `MayChange`."""
    found = set()
    for name, field in section.model_fields.items():
        if any(isinstance(mark, _MayChange) for mark in field.metadata):
            found.add(name)
        else:
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    found |= {f"{name}.{below}" for below in changeable_settings(kind)}
    return frozenset(found)


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


def _unless_none() -> Any:
    return Field(exclude_if=lambda value: value is None)


class ModelSettings(Section):
    """The network; options that are not set are those of the variant."""

    name: str
    """A variant such as `coatnet_5`."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block; it rises linearly from 0 over the blocks."""
    head_size: PositiveInt | None = None
    """Channels of one attention head."""
    relative_attention: BiasPlace | None = None
    """Where the relative bias is added: before the softmax, after it, or nowhere."""
    convolution_norm: ConvolutionNorm | None = None
    """BatchNorm or LayerNorm in the stem and in MBConv."""
    pool: Pooling | None = None
    """2x2 pooling where a stage strides."""
    stride_in: StridePlace | None = None
    """Where MBConv strides: in the 1x1 expansion, or in the depthwise convolution."""
    head_hidden_layer: bool | None = None
    """A hidden layer before the classifier."""
    # Left out of a frozen recipe at their defaults, so that digests of runs without them stay what they were.
    gelu: Annotated[Gelu | None, _unless_none()] = None
    """GELU by its approximation with tanh, or exact, as timm has it."""
    batch_norm_epsilon: Annotated[Positive | None, _unless_none()] = None
    """What BatchNorm adds to a variance; timm has 1e-5."""
    layer_norm_epsilon: Annotated[Positive | None, _unless_none()] = None
    """What LayerNorm adds to a variance; timm has 1e-6."""
    depths: Numbers | None = None
    """Blocks of each stage."""
    widths: Numbers | None = None
    """Channels of the stem and of each stage."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set."""
        return self.model_dump(exclude={"name", "drop_path_rate"}, exclude_none=True)

    @property
    def variant(self) -> Variant:
        """The variant with the options.

        Raises:
            ValueError: an unknown name, or options that the variant does not have.
        """
        return find_variant(self.name, **self.options)


class BatchSettings(Section):
    """Samples of a step."""

    global_size: PositiveInt
    """Samples of one optimizer step over all ranks."""
    micro_size: PositiveInt
    """Samples of one forward pass, over which BatchNorm computes its statistics; must divide `global_size`."""

    @model_validator(mode="after")
    def _micro_divides_global(self) -> Self:
        if self.global_size % self.micro_size:
            raise ValueError(
                f"micro_size {self.micro_size} does not divide global_size {self.global_size}; "
                f"{_nearest_divisor(self.global_size, self.micro_size)} would"
            )
        return self

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step over all ranks."""
        return self.global_size // self.micro_size


class OptimizerSettings(Section):
    """AdamW and its learning rate schedule."""

    peak_learning_rate: Annotated[float, Field(gt=0)]
    minimum_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Where cosine and linear decay end."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear rise from zero; an alternative to `warmup_epochs`."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled; not applied to biases, norms and relative bias tables."""
    betas: Pair = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum global norm of the gradient; 0 disables clipping."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor from the learning rate of a layer to that of the one before it; the head has the full rate."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("warmup_steps and warmup_epochs are both given; keep one")
        if self.minimum_learning_rate > self.peak_learning_rate:
            raise ValueError("minimum_learning_rate is above peak_learning_rate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas: both must be at least 0 and less than 1")
        return self


class LossSettings(Section):
    """The training objective."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class NonFiniteSettings(Section):
    """What happens after a loss or gradient that is not finite; the step itself is never applied."""

    in_a_row: PositiveInt = 10
    """Number of such steps in a row that end the run or roll it back."""
    roll_backs: Annotated[int, Field(ge=0)] = 0
    """How often a run may return to its last checkpoint from before them and continue after the data that did it."""


class WatchdogSettings(Section):
    """When a rank that makes no progress is considered hung."""

    setup_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Limit before the first step, and minimum limit of the first step, save and evaluation of a start."""
    least_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Minimum limit of a later step, save or evaluation."""
    factor: Annotated[float, Field(gt=1)] = 10.0
    """Their limit as a multiple of the longest one so far, if that is more."""


class JobResources(Section):
    """What a job requests from Slurm; what is not set is the site's default."""

    time_limit: str | None = None
    """Time limit of a start in a form of `sbatch --time`, such as `12:00:00` or `1-12:00:00`; training saves and ends
    before it expires."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Required features of the nodes."""
    memory_gigabytes: PositiveInt | None = None
    """Memory of each node, in units of 2**30 bytes."""
    flags: Annotated[tuple[str, ...], Strict(False)] = ()
    """Additional options of sbatch, such as `--exclusive`; not those that have a setting or that the program sets."""
    container: ImageName | None = None
    """Container image in which the ranks run."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: Annotated[tuple[Mount, ...], Strict(False)] = ()
    """Folders visible in the container, as `PATH` or `PATH:PATH_INSIDE`."""

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            time_limit_seconds(value)
        return value

    @field_validator("flags")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for flag in value:
            check_flag(flag)
        return value

    @property
    def time_limit_seconds(self) -> float | None:
        """`time_limit` in seconds."""
        return None if self.time_limit is None else float(time_limit_seconds(self.time_limit))


class Resources(JobResources):
    """The machines of a stage; any of this may change between two starts."""

    nodes: PositiveInt = 1
    """Machines; must divide `ranks`."""
    ranks: PositiveInt = 1
    """Processes on all machines together, one per GPU."""
    gpus_per_rank: Annotated[int, Field(ge=0, le=1)] = 1
    """0 for machines without GPUs."""
    gpu_gigabytes: Annotated[float, Field(gt=0)] = 80.0
    """Memory of a GPU, in units of 1e9 bytes, with which `coatnet doctor` compares what a rank of a job needs."""
    cpus_per_rank: PositiveInt | None = None
    """Processors of a rank; by default one for each of `data.workers` and, without GPUs, of `threads_per_rank`."""
    threads_per_rank: PositiveInt = 1
    """Compute threads of a rank without a GPU."""

    @model_validator(mode="after")
    def _nodes_divide_ranks(self) -> Self:
        if self.ranks % self.nodes:
            raise ValueError(f"nodes {self.nodes} does not divide ranks {self.ranks}, which counts those of all nodes")
        return self

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each machine."""
        return self.ranks // self.nodes


class ShardBuildSettings(Section):
    """Shards that a chain builds before its first stage if they do not exist, as `coatnet shards build` does."""

    source: PathOrUrl
    """The source as for `coatnet shards build`: a folder, a tar or a list of images."""
    folder: ShardsPath
    """Where the folders `train` and `validation` are created."""
    parts: PositiveInt = 1
    """Jobs of an array that divide the reading among them."""
    seed: Annotated[int, Field(ge=0)] = 0
    samples_per_shard: PositiveInt = 4096
    """Maximum number of images in one tar."""
    validation_per_class: Annotated[int, Field(ge=0)] = 0
    short_side: PositiveInt | None = None
    """Length to which larger images are shrunk, in pixels."""
    convert: bool = False
    """Whether images that are not upright RGB JPEGs are converted to that."""
    skip_broken: bool = False
    """Whether images that do not decode are left out."""
    processes: PositiveInt = 1
    """Processes of each job that read, check and write."""
    resources: JobResources = JobResources()

    @property
    def build_options(self) -> dict[str, Any]:
        """The options of `build_shards`."""
        return self.model_dump(exclude={"source", "folder", "parts", "resources"})


_MOST_TRIED = 10**6  # all divisors of a trillion; a number of 19 digits would take hours


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [n for n in range(1, min(math.isqrt(number), _MOST_TRIED) + 1) if number % n == 0]
    return min(divisors + [number // n for n in divisors], key=lambda n: abs(n - wanted))
