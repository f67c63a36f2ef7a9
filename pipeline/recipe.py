"""What a recipe says: a chain of stages and every setting of each. The file format is in `recipe_file.py`.

The published recipes are in Table 10 of the CoAtNet paper; defaults here are its common choices.
"""

import getpass
import math
import tempfile
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from models.options import BiasPlace, CheckpointingPolicy, ConvolutionNorm, Pooling, StridePlace
from models.variants import Variant, find_variant

PositiveInt = Annotated[int, Field(gt=0)]
# YAML has lists and no tuples.
Numbers = Annotated[tuple[PositiveInt, ...], Strict(False)]
Pair = Annotated[tuple[Annotated[float, Strict()], Annotated[float, Strict()]], Strict(False)]


class Section(BaseModel):
    """A part of a recipe: unknown keys and mistyped values are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RemoteStorage(Section):
    """How remote shards are reached; what is not given comes from the usual AWS variables and files."""

    endpoint: str | None = None
    """URL of an S3 server other than Amazon's."""
    profile: str | None = None
    """Profile in the AWS credentials file."""
    anonymous: bool = False
    """Ask without credentials."""
    give_up_after: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without an answer after which the run stops, to be continued later."""


class ShardCache(Section):
    """Where each node keeps remote shards; all its ranks share the folder."""

    folder: str = f"{tempfile.gettempdir()}/coatnet-shards-{getpass.getuser()}"
    """On a disk of the node itself."""
    gigabytes: Annotated[float, Field(gt=0)] = 100.0
    """Most that it holds."""
    downloads: Annotated[int, Field(gt=0, le=64)] = 8
    """Shards fetched at a time."""


class RandomAugment(Section):
    """RandAugment at the scale of the EfficientNet code, in which the paper states it."""

    layers: PositiveInt
    """Operations in a row on each training picture."""
    magnitude: Annotated[float, Field(ge=0, le=30)]
    """Their strength: 15 rotates by 45 degrees."""


class Data(Section):
    """Where samples come from and how they are ordered and cut."""

    train: str | None = None
    """Folder of training shards, a path or a URL. Relative paths start at the recipe's folder."""
    validation: str
    """Folder of evaluation shards, a path or a URL."""
    label_map: str | None = None
    """File that renames, merges or drops classes of the training shards."""
    validation_label_map: str | None = None
    """The same for the evaluation shards."""
    storage: RemoteStorage = RemoteStorage()
    cache: ShardCache = ShardCache()
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
    random_augment: RandomAugment | None = None
    """RandAugment after crop and flip."""
    evaluation_crop: Literal["center", "whole"] = "center"
    """Evaluation view: the central S / (S + 32), or the whole picture resized."""
    skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """The run stops when more than this share of the samples read since its start cannot be used."""
    skipped_run: PositiveInt = 32
    """The run stops when so many samples that a rank reads one after the other cannot be used."""
    workers: PositiveInt = 4
    """Reader threads of each rank."""

    @model_validator(mode="after")
    def _area_is_a_range(self) -> Self:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError("crop_area: must be two shares of the picture, 0 < least <= greatest <= 1")
        return self


class Model(Section):
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


class Batch(Section):
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


class Optimizer(Section):
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("warmup_steps and warmup_epochs are both given; keep one")
        if self.minimum_learning_rate > self.peak_learning_rate:
            raise ValueError("minimum_learning_rate is above peak_learning_rate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas: both must be at least 0 and less than 1")
        return self


class Loss(Section):
    """What is minimized."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Checkpoint(Section):
    """When state is saved, and how much of it is kept."""

    every_steps: PositiveInt = 1000
    """Steps between saves; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""


class Evaluation(Section):
    """When a training stage evaluates; it always does at its end."""

    every_steps: PositiveInt | None = None


class Log(Section):
    """What a person watching sees."""

    every_steps: PositiveInt = 10
    """Steps between log lines and TensorBoard points."""


class Resources(Section):
    """The machines of a stage. Not part of the run's identity: any of it may change between restarts."""

    ranks: PositiveInt = 1
    """Processes, one for each GPU."""
    threads_per_rank: PositiveInt = 1
    """Compute threads of a rank without a GPU."""


class Stage(Section):
    """What training and evaluation stages have in common."""

    start_from: str | None = None
    """The earlier stage whose final weights this one starts from."""
    resolution: PositiveInt
    """Side of the square pictures, in pixels."""
    data: Data
    model: Model
    batch: Batch
    loss: Loss = Loss()
    precision: Literal["fp32", "bf16"] = "bf16"
    log: Log = Log()
    resources: Resources = Resources()


class TrainStage(Stage):
    """Train, then evaluate."""

    task: Literal["train"] = "train"
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the stage; or say `steps`."""
    steps: PositiveInt | None = None
    optimizer: Optimizer
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """MixUp inside each micro-batch, its weight from Beta(alpha, alpha); 0 for none."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What DeepSpeed ZeRO shards: 1 optimizer state, 2 gradients too, 3 parameters too."""
    activation_checkpointing: CheckpointingPolicy = "none"
    """Blocks whose activations are computed again in the backward: all, those that convolve, or every k-th."""
    compile: bool = False
    """Whether torch.compile makes one kernel graph of each block."""
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _is_a_policy(cls, value: Any) -> Any:
        names = [name for kind in get_args(CheckpointingPolicy) for name in get_args(kind)]
        if value not in names and not (type(value) is int and value > 0):
            raise ValueError(f"{value!r} is not one of {', '.join(names)}, or a number k for every k-th block")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the stage either as epochs or as steps")
        if self.data.train is None:
            raise ValueError("data.train is missing: the folder of the training shards")
        if self.zero_stage == 0 and self.precision == "bf16":
            # DeepSpeed takes a dummy optimizer step at start there (FP16_UnfusedOptimizer).
            raise ValueError("zero_stage 0 with bf16 trains wrongly in DeepSpeed; use zero_stage 1, also on one rank")
        if self.zero_stage == 3 and self.compile:
            # Its hooks gather parameters inside the blocks, which breaks their graphs.
            raise ValueError("compile does not work with zero_stage 3; use zero_stage 2, or leave compile out")
        return self


class EvaluateStage(Stage):
    """Evaluate the final weights of an earlier stage."""

    task: Literal["evaluate"]

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.start_from is None:
            raise ValueError("start_from is missing: the stage whose weights are evaluated")
        return self


AnyStage = Annotated[TrainStage | EvaluateStage, Field(discriminator="task")]


class Recipe(Section):
    """A chain of stages, run in the order written."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    """Names the folder below `runs`: letters, digits, dot, dash and underscore."""
    runs: str = "runs"
    """Folder of all run folders. A relative path starts at the recipe's folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    stages: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.\-]+$")], AnyStage], Field(min_length=1)]

    @model_validator(mode="after")
    def _starts_are_earlier_stages(self) -> Self:
        seen: list[str] = []
        for name, stage in self.stages.items():
            if stage.start_from is not None and stage.start_from not in seen:
                earlier = ", ".join(seen) or "there is none"
                raise ValueError(f"stages.{name}.start_from: {stage.start_from} is no earlier stage ({earlier})")
            if stage.start_from is not None and isinstance(self.stages[stage.start_from], EvaluateStage):
                raise ValueError(f"stages.{name}.start_from: {stage.start_from} only evaluates and has no weights")
            seen.append(name)
        return self


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return min(divisors + [number // n for n in divisors], key=lambda n: abs(n - wanted))
