"""What decides whether a setting of a stage has an effect: the stage, its recipe and its data."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from data.remote.storage import is_remote
from models.variants import Variant
from pipeline.plan import TrainPlan
from pipeline.recipe.schema import EvaluateStage, Recipe, Stage, TrainStage, recommended
from pipeline.recipe.sections import OptimizerSettings


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides whether the settings of a stage have an effect.

    Args:
        recipe: as a person wrote it, or a frozen one.
        name: of the stage.
        plan: of the stage, if it trains and its data are known.
        slurm: whether it will run as a job of Slurm; None if that is not known.
    """

    recipe: Recipe
    name: str
    plan: TrainPlan | None = None
    slurm: bool | None = None

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.name]

    @property
    def training(self) -> TrainStage | None:
        """The stage, if it trains."""
        return self.stage if isinstance(self.stage, TrainStage) else None

    @property
    def variant(self) -> Variant | None:
        """The model; None for one that does not exist, which other checks report."""
        try:
            return self.stage.model.variant
        except ValueError:
            return None

    @property
    def shards(self) -> list[str]:
        """Folders of the shards."""
        data = self.stage.data
        return [folder for folder in (data.train if self.training else None, data.validation) if folder]

    @property
    def locations(self) -> list[str]:
        """Everything that the stage reads and writes by `data.storage`."""
        data = self.stage.data
        stage = self.stage
        stages = [stage, *([self.recipe.stages[stage.start_stage]] if stage.start_stage else [])]
        checkpoints = [stage.checkpoint.folder for stage in stages if isinstance(stage, TrainStage)]
        others = (data.label_map, data.validation_label_map, stage.start_source, *checkpoints)
        return [*self.shards, *(location for location in others if location)]


def only_evaluates(facts: Facts) -> bool:
    """Whether the stage does not train."""
    return isinstance(facts.stage, EvaluateStage)


def any_remote(locations: list[str], schemes: str = "") -> bool:
    """Whether one of the locations is a URL, with `schemes` of that kind."""
    return any(is_remote(location) and location.startswith(schemes) for location in locations)


def lacks_blocks(kind: str) -> Callable[[Facts], bool]:
    """Whether no block of the model is of this kind."""
    return lambda facts: facts.variant is not None and all(stage.kind != kind for stage in facts.variant.stages)


def exceeds_stage(section: str, setting: str = "every_steps") -> Callable[[Facts], bool]:
    """Whether a number of steps, as the plan has it, is more than those of the stage."""

    def exceeds(facts: Facts) -> bool:
        plan = facts.plan
        every = getattr(getattr(plan.stage, section), setting) if plan else None
        return plan is not None and every is not None and every > plan.steps

    return exceeds


def below_a_step(section: str) -> Callable[[Facts], bool]:
    """Whether `every_epochs` of a section is less than half a step."""

    def below(facts: Facts) -> bool:
        plan, stage = facts.plan, facts.training
        epochs = getattr(getattr(stage, section), "every_epochs", None)
        return (
            plan is not None and epochs is not None and epochs * plan.train.samples < plan.stage.batch.global_size / 2
        )

    return below


def never_together(facts: Facts, *intervals: int | None) -> bool:
    """Whether what happens at multiples of each of these steps never happens at the same one before the last."""
    plan = facts.plan
    return plan is not None and None not in intervals and math.lcm(*(n for n in intervals if n)) >= plan.steps


def keeps_none(facts: Facts) -> bool:
    """Whether no checkpoint before the last is written at a step of `keep_every`."""
    checkpoint = facts.plan.stage.checkpoint if facts.plan else None
    return checkpoint is not None and never_together(facts, checkpoint.interval, checkpoint.keep_every)


def keeps_no_best(facts: Facts) -> bool:
    """Whether no checkpoint before the last is written at a step of an evaluation."""
    stage = facts.plan.stage if facts.plan else None
    if stage is None or not stage.checkpoint.keep_best:
        return False
    return never_together(facts, stage.checkpoint.interval, stage.evaluation.every_steps)


def shards_on_one_rank(facts: Facts) -> bool:
    """Whether a ZeRO stage that was chosen for it shards gradients or parameters over a single rank."""
    stage = facts.training
    if stage is None or stage.resources.ranks > 1:
        return False
    return stage.zero_stage >= 2 and stage.zero_stage != recommended(stage.model.name)[1]


def is_mixed(stage: TrainStage) -> bool:
    """Whether MixUp or CutMix mixes the images."""
    return stage.mixup_alpha > 0 or stage.cutmix_alpha > 0


def has_both_mixings(facts: Facts) -> bool:
    """Whether each batch is mixed by MixUp or CutMix."""
    stage = facts.training
    return stage is not None and stage.mixup_alpha > 0 and stage.cutmix_alpha > 0


def switch_probability(facts: Facts) -> float | None:
    """Probability of CutMix where both could mix a batch; None for a stage that does not train."""
    return facts.training.mixup_switch_probability if facts.training else None


def is_constant(optimizer: OptimizerSettings) -> bool:
    """Whether the learning rate never reaches the minimum."""
    return optimizer.schedule == "constant" and optimizer.minimum_learning_rate != optimizer.peak_learning_rate
