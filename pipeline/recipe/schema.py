"""A recipe: a chain of stages and every setting of each. `loader.py` reads it from a file."""

import difflib
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from models.options import CheckpointingPolicy
from pipeline.recipe.intervals import CheckpointSettings, EvaluationSettings, LogSettings
from pipeline.recipe.locations import RunsPath
from pipeline.recipe.sections import (
    BatchSettings,
    DataSettings,
    LossSettings,
    MayChange,
    ModelSettings,
    NonFiniteSettings,
    OptimizerSettings,
    PositiveInt,
    Resources,
    Section,
    ShardBuildSettings,
    WatchdogSettings,
    WhichWeights,
)

SMALL_IMAGES = 160
"""Below this size in pixels, evaluations see the whole image by default: the paper's centre crop, which leaves 77 % of
a square picture at 224 pixels, would leave 25 % at 32."""

Precision = Literal["fp32", "bf16", "bf16_autocast"]

RECOMMENDED: dict[str, tuple[Precision, int]] = {
    "coatnet_5": ("bf16", 1),
    "coatnet_6": ("bf16", 2),
    "coatnet_7": ("bf16", 2),
}
"""Precision and ZeRO stage by the prefix of the variant's name, where memory is the limit: bf16 weights take half the
space, and beyond a billion parameters the gradients are sharded, too."""
RECOMMENDED_OTHERWISE: tuple[Precision, int] = ("bf16_autocast", 1)
"""Float32 weights under autocast have the least rounding."""


def recommended(model: str) -> tuple[Precision, int]:
    """Precision and ZeRO stage for the variant `model`, where a recipe does not set them."""
    return next((value for name, value in RECOMMENDED.items() if model.startswith(name)), RECOMMENDED_OTHERWISE)


_GREATEST_RESOLUTION = 8192  # sizes of tensors overflow beyond some millions
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".npz")


class Stage(Section):
    """What training and evaluation stages have in common."""

    start_from: str | None = None
    """The earlier stage whose final weights this one starts from."""
    start_weights: WhichWeights = "auto"
    """Which of them: `raw`, `ema`, or `auto`: the moving average if there is one."""
    resolution: Annotated[PositiveInt, Field(le=_GREATEST_RESOLUTION)]
    """Side of the square images, in pixels."""
    data: DataSettings
    model: ModelSettings
    batch: BatchSettings
    loss: LossSettings = LossSettings()
    precision: Precision = RECOMMENDED_OTHERWISE[0]
    """Of weights and arithmetic; by default what is recommended for the variant."""
    log: MayChange[LogSettings] = LogSettings()
    watchdog: MayChange[WatchdogSettings] = WatchdogSettings()
    resources: MayChange[Resources] = Resources()

    @property
    def busy_threads(self) -> int:
        """Threads of a rank that need a processor each."""
        return self.data.workers + (0 if self.resources.gpus_per_rank else self.resources.threads_per_rank)

    @model_validator(mode="before")
    @classmethod
    def _recommended(cls, values: Any) -> Any:
        """Fill in what is recommended for the variant and for the image size where a stage does not set it."""
        if not isinstance(values, dict):
            return values
        data, resolution = values.get("data"), values.get("resolution")
        if isinstance(data, dict) and isinstance(resolution, int) and resolution < SMALL_IMAGES:
            values = values | {"data": {"evaluation_crop": "whole"} | data}
        model = values.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            return values
        precision, zero_stage = recommended(model["name"])
        defaults = {"precision": precision} | ({"zero_stage": zero_stage} if "zero_stage" in cls.model_fields else {})
        return defaults | values


class TrainStage(Stage):
    """Train, then evaluate."""

    task: Literal["train"] = "train"
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the stage; an alternative to `steps`."""
    steps: PositiveInt | None = None
    optimizer: OptimizerSettings
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """MixUp inside each micro-batch, with weights from Beta(alpha, alpha); 0 disables it."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights; None for no average."""
    zero_stage: MayChange[Annotated[int, Field(ge=0, le=3)]] = 1
    """What DeepSpeed ZeRO shards: 1 optimizer state, 2 also gradients, 3 also parameters; by default what is
    recommended for the variant."""
    activation_checkpointing: MayChange[CheckpointingPolicy] = "none"
    """Blocks whose activations are recomputed in the backward pass: all, the convolutional ones, or every k-th."""
    compile: MayChange[bool] = False
    """Whether each block is compiled with torch.compile."""
    checkpoint: MayChange[CheckpointSettings] = CheckpointSettings()
    evaluation: MayChange[EvaluationSettings] = EvaluationSettings()
    non_finite: MayChange[NonFiniteSettings] = NonFiniteSettings()

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
        if self.zero_stage == 0 and self.precision != "fp32":
            # DeepSpeed takes a dummy optimizer step at start there (FP16_UnfusedOptimizer).
            raise ValueError(
                f"zero_stage 0 with {self.precision} trains wrongly in DeepSpeed; use zero_stage 1, also on one rank"
            )
        if self.zero_stage == 3 and self.compile:
            # Its hooks gather parameters inside the blocks, which breaks their graphs.
            raise ValueError("compile does not work with zero_stage 3; use zero_stage 2, or leave compile out")
        if self.evaluation.weights == "ema" and self.ema_decay is None:
            raise ValueError("evaluation.weights: without ema_decay there is no moving average; set it, or use raw")
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
    runs: Annotated[RunsPath, Field(validate_default=True)] = "runs"
    """Folder of all run folders. A relative path starts at the recipe's folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    shards: ShardBuildSettings | None = None
    """Shards to build before the first stage, if they do not exist yet."""
    stages: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.\-]+$")], AnyStage], Field(min_length=1)]

    @model_validator(mode="after")
    def _starts_are_earlier_stages(self) -> Self:
        seen: list[str] = []
        for name, stage in self.stages.items():
            if stage.start_from is not None and stage.start_from not in seen:
                raise ValueError(f"stages.{name}.start_from: {_not_earlier(stage.start_from, seen, self.name)}")
            if stage.start_from is not None and isinstance(self.stages[stage.start_from], EvaluateStage):
                raise ValueError(f"stages.{name}.start_from: {stage.start_from} only evaluates and has no weights")
            start = self.stages[stage.start_from] if stage.start_from is not None else None
            if stage.start_weights == "ema" and isinstance(start, TrainStage) and start.ema_decay is None:
                raise ValueError(
                    f"stages.{name}.start_weights: {stage.start_from} has no ema_decay, so there is no moving average; "
                    "set it there, or use raw"
                )
            seen.append(name)
        return self


def _not_earlier(start: str, earlier: list[str], recipe: str) -> str:
    """Why `start` is none of the `earlier` stages, and what to write: some give a file of weights."""
    what = f"{start} is not an earlier stage ({', '.join(earlier) or 'there is none'})"
    if "/" in start or start.endswith(_WEIGHT_FILES):
        return (
            f"{what}; a stage starts from a stage of its recipe, not from a file or address: to start from a stage of "
            f"another run, describe it here with its settings, and copy its run folder into {recipe} below runs"
        )
    near = difflib.get_close_matches(start, earlier, 1)
    return f"{what}; did you mean {near[0]}?" if near else what
