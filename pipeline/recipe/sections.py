"""The sections of a stage in a recipe, each with its settings and their checks.

Defaults are the common choices of the published recipes, Table 10 of the CoAtNet paper.
"""

import getpass
import math
import re
import tempfile
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from models.options import BiasPlace, ConvolutionNorm, Pooling, StridePlace
from models.variants import Variant, find_variant

PositiveInt = Annotated[int, Field(gt=0)]
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
    """A part of a recipe: unknown keys and mistyped values are refused."""

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
    """How remote shards are reached; what is not given comes from the usual AWS variables and files."""

    endpoint: str | None = None
    """URL of an S3 server other than Amazon's."""
    profile: str | None = None
    """Profile in the AWS credentials file."""
    anonymous: bool = False
    """Ask without credentials."""
    give_up_after: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without an answer after which the run stops, to be continued later."""


class CacheSettings(Section):
    """Where each node keeps remote shards; all its ranks share the folder."""

    folder: str = f"{tempfile.gettempdir()}/coatnet-shards-{getpass.getuser()}"
    """On a disk of the node itself."""
    gigabytes: Annotated[float, Field(gt=0)] = 100.0
    """Most that it holds."""
    downloads: Annotated[int, Field(gt=0, le=64)] = 8
    """Shards fetched at a time."""


class RandomAugmentSettings(Section):
    """RandAugment at the scale of the EfficientNet code, in which the paper states it."""

    layers: PositiveInt
    """Operations in a row on each training picture."""
    magnitude: Annotated[float, Field(ge=0, le=30)]
    """Their strength: 15 rotates by 45 degrees."""


class DataSettings(Section):
    """Where samples come from and how they are ordered and cut."""

    train: MayChange[str | None] = None
    """Folder of training shards, a path or a URL. Relative paths start at the recipe's folder."""
    validation: MayChange[str]
    """Folder of evaluation shards, a path or a URL."""
    label_map: MayChange[str | None] = None
    """File that renames, merges or drops classes of the training shards."""
    validation_label_map: MayChange[str | None] = None
    """The same for the evaluation shards."""
    storage: MayChange[StorageSettings] = StorageSettings()
    cache: MayChange[CacheSettings] = CacheSettings()
    lanes: PositiveInt = 64
    """Streams that a global batch is drawn from; divides the global batch."""
    shuffle_window: PositiveInt = 8192
    """Samples shuffled among each other inside a lane."""
    crop: Literal["random", "whole"] = "random"
    """Training view: a random window, or the whole picture resized."""
    crop_area: Pair = (0.05, 1.0)
    """Least and greatest share of the picture that a random window covers."""
    flip: bool = True
    """Mirror half of the training pictures."""
    random_augment: RandomAugmentSettings | None = None
    """RandAugment after crop and flip."""
    evaluation_crop: Literal["center", "whole"] = "center"
    """Evaluation view: the central S / (S + 32), or the whole picture resized."""
    skipped_share: MayChange[Annotated[float, Field(ge=0, le=1)]] = 0.001
    """The run stops when more than this share of the samples read since its start cannot be used."""
    skipped_run: MayChange[PositiveInt] = 32
    """The run stops when so many samples that a rank reads one after the other cannot be used."""
    workers: MayChange[PositiveInt] = 4
    """Reader threads of each rank."""

    @model_validator(mode="after")
    def _area_is_a_range(self) -> Self:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError("crop_area: must be two shares of the picture, 0 < least <= greatest <= 1")
        return self


class ModelSettings(Section):
    """Which network; options that are not given are the variant's own."""

    name: str
    """A variant such as `coatnet_5`."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the last block; rises linearly from 0 over the blocks."""
    head_size: PositiveInt | None = None
    """Channels of one attention head."""
    relative_attention: BiasPlace | None = None
    """Where the relative bias is added: before the softmax, after it, or nowhere."""
    convolution_norm: ConvolutionNorm | None = None
    """BatchNorm or LayerNorm in the stem and in MBConv."""
    pool: Pooling | None = None
    """2x2 pooling where a stage strides."""
    stride_in: StridePlace | None = None
    """Where MBConv strides: in the 1x1 expansion or in the depthwise convolution."""
    head_hidden_layer: bool | None = None
    """A hidden layer before the classifier."""
    depths: Numbers | None = None
    """Blocks of each stage."""
    widths: Numbers | None = None
    """Channels of the stem and of each stage."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that are given."""
        return self.model_dump(exclude={"name", "drop_path_rate"}, exclude_none=True)

    @property
    def variant(self) -> Variant:
        """The variant with the options.

        Raises:
            ValueError: an unknown name, or options that it does not take.
        """
        return find_variant(self.name, **self.options)


class BatchSettings(Section):
    """How many samples a step takes."""

    global_size: PositiveInt
    """Samples of one optimizer step over all ranks."""
    micro_size: PositiveInt
    """Samples of one forward; BatchNorm's unit, so part of the run's identity. Divides `global_size`."""

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
    """AdamW and its learning rate over the stage."""

    peak_learning_rate: Annotated[float, Field(gt=0)]
    minimum_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Where cosine and linear decay end."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear rise from zero; or say `warmup_epochs`."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled; biases, norms and relative tables are left alone."""
    betas: Pair = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Greatest global norm of the gradient; 0 for none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor from the learning rate of a layer to that of the one before it; the head has the whole rate."""

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
    """What is minimized."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class CheckpointSettings(Section):
    """When state is saved, where, and how much of it is kept."""

    every_steps: PositiveInt = 1000
    """Steps between saves; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of it are kept for good."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """So many checkpoints with the best top-1 in an evaluation at their step are kept."""
    folder: str | None = None
    """A path or a URL below which `<recipe>/<stage>/step-...` is kept, instead of the run folder."""
    grace_seconds: Annotated[float, Field(gt=0)] = 120.0
    """After a signal that asks the run to stop: seconds after which it ends even if its save is not whole."""


class EvaluationSettings(Section):
    """When a training stage evaluates, and which weights; it always does at its end."""

    every_steps: PositiveInt | None = None
    weights: WhichWeights = "auto"
    """`raw`, `ema`, or `auto`: the moving average where there is one."""


class NonFiniteSettings(Section):
    """What happens after a loss or a gradient that is not finite; the step itself is never applied."""

    in_a_row: PositiveInt = 10
    """So many in a row end the run, or roll it back."""
    roll_backs: Annotated[int, Field(ge=0)] = 0
    """How often a run goes back to its last checkpoint and goes on behind the data that led there."""


class WatchdogSettings(Section):
    """When a rank that does not get on is taken to hang."""

    setup_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """For the time before the first step, and at least for the first step, save and evaluation of a start."""
    least_seconds: Annotated[float, Field(gt=0)] = 300.0
    """No step, save or evaluation is taken to hang before."""
    factor: Annotated[float, Field(gt=1)] = 10.0
    """Nor before so many times the longest one so far."""


class LogSettings(Section):
    """What a person watching sees."""

    every_steps: PositiveInt = 10
    """Steps between log lines and TensorBoard points."""
    samples: bool = False
    """Whether each rank writes down which samples it was trained on."""
    histograms_every_steps: PositiveInt | None = None
    """Steps between histograms of the weights; a file `histograms` in the run folder asks for one."""


class JobResources(Section):
    """What a job asks Slurm for; what is not given is the site's default."""

    time_limit: str | None = None
    """Time that a start may take, as `[days-]hours:minutes:seconds`; training saves and ends before it is over."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that the nodes must have."""
    memory_gigabytes: PositiveInt | None = None
    """Of each node, in units of 2**30 bytes."""
    flags: Annotated[tuple[str, ...], Strict(False)] = ()
    """Further options of sbatch, such as `--exclusive`."""
    container: str | None = None
    """Image in which the ranks run."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: Annotated[tuple[str, ...], Strict(False)] = ()
    """Folders to be seen inside, as `PATH` or `PATH:PATH_INSIDE`."""

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.match(value):
            raise ValueError(f"{value!r} is no time; write [days-]hours:minutes:seconds, such as 1-12:00:00")
        return value

    @field_validator("flags")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for flag in value:
            if not flag.startswith("-"):
                raise ValueError(f"{flag!r} is no option of sbatch; write it as one word, such as --nodelist=node[1-4]")
        return value

    @property
    def time_limit_seconds(self) -> float | None:
        """`time_limit` in seconds."""
        match = _TIME.match(self.time_limit or "")
        if match is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class Resources(JobResources):
    """The machines of a stage. Not part of the run's identity: any of it may change between restarts."""

    nodes: PositiveInt = 1
    """Machines; divides `ranks`."""
    ranks: PositiveInt = 1
    """Processes on all machines together, one for each GPU."""
    gpus_per_rank: Annotated[int, Field(ge=0, le=1)] = 1
    """0 for machines without GPUs."""
    gpu_gigabytes: Annotated[float, Field(gt=0)] = 80.0
    """Memory of a GPU, in units of 1e9 bytes: what `coatnet doctor` holds the needs of a rank against."""
    cpus_per_rank: PositiveInt | None = None
    """Processors of a rank; unless given, one for each of `data.workers` and, without GPUs, of `threads_per_rank`."""
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
    """Shards that a chain builds before its first stage, unless they are there; as `coatnet shards build` does."""

    source: str
    """What `coatnet shards build` takes: a folder, a tar or a list of images."""
    folder: str
    """Where `train` and `validation` come to lie."""
    parts: PositiveInt = 1
    """Jobs of an array that share the reading."""
    seed: Annotated[int, Field(ge=0)] = 0
    samples_per_shard: PositiveInt = 4096
    """Most images of one tar."""
    validation_per_class: Annotated[int, Field(ge=0)] = 0
    short_side: PositiveInt | None = None
    """Larger images are shrunk to it, in pixels."""
    convert: bool = False
    """Whether what is no upright RGB JPEG becomes one."""
    skip_broken: bool = False
    """Whether images that do not decode are left out."""
    processes: PositiveInt = 1
    """That read, check and write in each job."""
    resources: JobResources = JobResources()

    @property
    def build_options(self) -> dict[str, Any]:
        """The options of `build_shards`."""
        return self.model_dump(exclude={"source", "folder", "parts", "resources"})


_TIME = re.compile(r"^(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)$")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return min(divisors + [number // n for n in divisors], key=lambda n: abs(n - wanted))
