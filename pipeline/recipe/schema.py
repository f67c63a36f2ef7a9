"""A recipe: a chain of stages and every setting of each. `loader.py` reads it from a file."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from models.options import CheckpointingPolicy
from pipeline.recipe.data_sections import DataSettings
from pipeline.recipe.intervals import CheckpointSettings, EvaluationSettings, LogSettings
from pipeline.recipe.locations import RunsPath, StageOrPath
from pipeline.recipe.section import MayChange, PositiveInt, Section, WhichWeights
from pipeline.recipe.sections import (
    BatchSettings,
    CommunicationSettings,
    LossSettings,
    ModelSettings,
    NonFiniteSettings,
    OptimizerSettings,
    Resources,
    ShardBuildSettings,
    VerifySettings,
    WatchdogSettings,
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


def sums_after_backward(precision: Precision, zero_stage: int) -> bool:
    """Whether DeepSpeed sums the gradients of the ranks in place, when all of them are there."""
    # With bf16 at ZeRO 1 it uses another optimizer than with float32.
    return zero_stage == 0 or (zero_stage == 1 and precision == "bf16")


WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin", ".npz")
"""Endings of files of weights; not all of them can be read."""
_GREATEST_RESOLUTION = 8192  # sizes of tensors overflow beyond some millions


class Stage(Section):
    """What training and evaluation stages have in common."""

    start_from: StageOrPath | None = None
    """Whose weights this one starts from: an earlier stage's, or those at the path or URL of a run folder, a
    checkpoint, an exported model or a file of weights."""
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
    deterministic: MayChange[bool] = True
    """Whether GPUs use deterministic algorithms alone, so that two runs have equal bits."""
    log: MayChange[LogSettings] = LogSettings()
    watchdog: MayChange[WatchdogSettings] = WatchdogSettings()
    resources: MayChange[Resources] = Resources()

    @property
    def start_stage(self) -> str | None:
        """The earlier stage that this one starts from, if it starts from one."""
        return None if self.start_from is None or "/" in self.start_from else self.start_from

    @property
    def start_source(self) -> str | None:
        """The path or URL of the weights that this one starts from, if they are not those of an earlier stage."""
        return self.start_from if self.start_from is not None and "/" in self.start_from else None

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
    # Left out of a frozen recipe at their defaults, so that digests of runs without them stay what they were.
    cutmix_alpha: Annotated[float, Field(ge=0, exclude_if=lambda alpha: alpha == 0)] = 0.0
    """CutMix inside each micro-batch, with areas from Beta(alpha, alpha); 0 disables it."""
    mixup_probability: Annotated[float, Field(gt=0, le=1, exclude_if=lambda share: share == 1)] = 1.0
    """Probability that a micro-batch is mixed, by either."""
    mixup_switch_probability: Annotated[float, Field(ge=0, le=1, exclude_if=lambda share: share == 0.5)] = 0.5
    """Probability of CutMix in place of MixUp for a micro-batch, if both are on."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights; None for no average."""
    zero_stage: MayChange[Annotated[int, Field(ge=0, le=3)]] = 1
    """What DeepSpeed ZeRO shards: 1 optimizer state, 2 also gradients, 3 also parameters; by default what is
    recommended for the variant."""
    activation_checkpointing: MayChange[CheckpointingPolicy] = "none"
    """Blocks whose activations are recomputed in the backward pass: all, the convolutional ones, or every k-th."""
    compile: MayChange[bool] = False
    """Whether each block is compiled with torch.compile."""
    # Left out of a frozen recipe at its default, as above.
    fused_depthwise: MayChange[Annotated[bool, Field(exclude_if=lambda fused: not fused)]] = False
    """Whether MBConv's depthwise convolutions, norms and GELUs are computed by fused kernels on GPUs."""
    communication: MayChange[
        Annotated[CommunicationSettings, Field(exclude_if=lambda settings: settings == CommunicationSettings())]
    ] = CommunicationSettings()
    """How the gradients of the ranks are summed."""
    checkpoint: MayChange[CheckpointSettings] = CheckpointSettings()
    evaluation: MayChange[EvaluationSettings] = EvaluationSettings()
    non_finite: MayChange[NonFiniteSettings] = NonFiniteSettings()
    # Left out of a frozen recipe at its default, as above.
    verify: MayChange[Annotated[VerifySettings, Field(exclude_if=lambda settings: settings == VerifySettings())]] = (
        VerifySettings()
    )
    """Whether and how often ranks check each other's arithmetic."""

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
        if self.zero_stage == 3 and self.fused_depthwise:
            # It takes parameters of three layers, which ZeRO 3 gathers for each layer's own forward alone.
            raise ValueError(
                "fused_depthwise does not work with zero_stage 3; use zero_stage 2, or leave fused_depthwise out"
            )
        if self.communication.gradients == "bf16" and self.precision != "bf16":
            raise ValueError(
                f"communication.gradients: with {self.precision} they are float32, and are summed as such; leave it "
                "out, or use precision bf16"
            )
        if self.verify.every_steps is not None and not self.deterministic and self.resources.gpus_per_rank:
            raise ValueError(
                "verify.every_steps: without deterministic, GPUs that work compute other bits than each other; leave "
                "deterministic out, or verify"
            )
        if self.evaluation.weights == "ema" and self.ema_decay is None:
            raise ValueError("evaluation.weights: without ema_decay there is no moving average; set it, or use raw")
        return self


class EvaluateStage(Stage):
    """Evaluate the final weights of an earlier stage, or a trained model from elsewhere."""

    task: Literal["evaluate"]

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.start_from is None:
            raise ValueError("start_from is missing: the stage or the model whose weights are evaluated")
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
    def _starts_are_earlier_stages(self, info: ValidationInfo) -> Self:
        folder = info.context if isinstance(info.context, Path) else None
        seen: list[str] = []
        for name, stage in self.stages.items():
            start = stage.start_stage
            if start is not None and start not in seen:
                path = folder / start if folder else None
                # A file of weights may be gone once the stage has checkpoints of its own.
                is_path = path is not None and (path.exists() or start.endswith(WEIGHT_FILES))
                if path is None or not is_path or start in self.stages:
                    raise ValueError(f"stages.{name}.start_from: {_not_earlier(start, seen, path)}")
                self.stages[name] = stage.model_copy(update={"start_from": str(path.resolve())})
            elif start is not None:
                _check_start_stage(name, stage, start, self.stages[start], folder)
            seen.append(name)
        return self


def _check_start_stage(name: str, stage: AnyStage, start: str, earlier: AnyStage, folder: Path | None) -> None:
    if folder is not None and _is_model(folder / start):
        raise ValueError(
            f"stages.{name}.start_from: {start} is an earlier stage, and {folder / start} is there as well; write "
            f"./{start} for that, or move it away to start from the stage"
        )
    if isinstance(earlier, EvaluateStage):
        raise ValueError(f"stages.{name}.start_from: {start} only evaluates and has no weights")
    if stage.start_weights == "ema" and earlier.ema_decay is None:
        raise ValueError(
            f"stages.{name}.start_weights: {start} has no ema_decay, so there is no moving average; "
            "set it there, or use raw"
        )


def _is_model(path: Path) -> bool:
    """Whether a stage could start from what is at `path`, by the look of it."""
    files = ("checkpoints", "manifest.json", "config.json")
    return path.is_file() if path.suffix in WEIGHT_FILES else any((path / file).exists() for file in files)


def _not_earlier(start: str, earlier: list[str], path: Path | None) -> str:
    """Why `start` is none of the `earlier` stages, nor a file or folder at `path`, and what to write."""
    what = f"{start} is not an earlier stage ({', '.join(earlier) or 'there is none'})"
    if path is not None and path.exists():
        return f"{what}, and a path as well; write ./{start} for that"
    near = difflib.get_close_matches(start, earlier, 1)
    fix = f"did you mean {near[0]}?" if near else "write ./NAME or /PATH for a file or folder of weights"
    return f"{what}; {fix}"
