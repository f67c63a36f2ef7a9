"""The sections of a stage in a recipe, each with its settings and their checks.

Defaults are the common choices of the published recipes, Table 10 of the CoAtNet paper.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from data.building.jpeg_encoding import QUALITY, SUBSAMPLING, Subsampling, refuse_without_effect
from models.options import BiasPlace, ConvolutionNorm, Gelu, Pooling, StridePlace
from models.variants import Variant, find_variant
from pipeline.recipe.locations import ImageName, Mount, PathOrUrl, ShardsPath
from pipeline.recipe.sbatch_flags import check_flag
from pipeline.recipe.section import (
    Numbers,
    Pair,
    Positive,
    PositiveInt,
    Section,
    unless_none,
)
from pipeline.recipe.time_limits import time_limit_seconds


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
    gelu: Annotated[Gelu | None, unless_none()] = None
    """GELU by its approximation with tanh, or exact, as timm has it."""
    batch_norm_epsilon: Annotated[Positive | None, unless_none()] = None
    """What BatchNorm adds to a variance; timm has 1e-5."""
    layer_norm_epsilon: Annotated[Positive | None, unless_none()] = None
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


class CommunicationSettings(Section):
    """How the gradients of the ranks are summed; docs/gpus.md has the reasons."""

    gradients: Literal["fp32", "bf16"] = "fp32"
    """What they are summed as. bf16 halves what is sent, and rounds each sum at every rank that adds to it."""
    overlap: bool | None = None
    """Whether they are summed in a stream of their own during the backward; by default with ZeRO 3 alone."""
    bucket_size: Annotated[PositiveInt, Field(le=4_000_000_000)] = 500_000_000
    """Elements that are summed together, in a buffer of this size."""


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


class VerifySettings(Section):
    """How often ranks check each other's arithmetic; docs/operating.md says what that finds, and what it costs."""

    every_steps: PositiveInt | None = None
    """Steps between checks, besides that of the first step of each start; None for none at all."""
    excluded_nodes: Annotated[int, Field(ge=0)] = 2
    """Nodes that a run may leave out as faulty, over all its starts, before it ends for good."""


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
    # Left out of a frozen recipe at their defaults, so that jobs submitted without them have the command they had.
    quality: Annotated[int, Field(ge=1, le=100, exclude_if=lambda quality: quality == QUALITY)] = QUALITY
    """Of the images that are encoded again, as JPEGs."""
    subsampling: Annotated[Subsampling, Field(exclude_if=lambda kind: kind == SUBSAMPLING)] = SUBSAMPLING
    """The resolution of their colour."""
    recompress: Annotated[bool, Field(exclude_if=lambda recompress: not recompress)] = False
    """Whether all images are encoded again, unless that would not make them smaller."""
    restart_markers: Annotated[bool, Field(exclude_if=lambda restart_markers: not restart_markers)] = False
    """Whether JPEGs are given restart markers, so that training decodes only what a crop needs."""
    skip_broken: bool = False
    """Whether images that do not decode are left out."""
    processes: PositiveInt = 1
    """Processes of each job that read, check and write."""
    resources: JobResources = JobResources()

    @model_validator(mode="after")
    def _quality_has_effect(self) -> Self:
        encodes = self.convert or self.recompress or self.short_side is not None
        refuse_without_effect(self.quality, self.subsampling, encodes)
        return self

    @property
    def build_options(self) -> dict[str, Any]:
        """The options of `build_shards`."""
        return self.model_dump(exclude={"source", "folder", "parts", "resources"})


_MOST_TRIED = 10**6  # all divisors of a trillion; a number of 19 digits would take hours


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [n for n in range(1, min(math.isqrt(number), _MOST_TRIED) + 1) if number % n == 0]
    return min(divisors + [number // n for n in divisors], key=lambda n: abs(n - wanted))
