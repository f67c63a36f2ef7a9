"""How long a stage takes and which learning rate it has, from its beginning and from where its settings are changed."""

import math
from dataclasses import dataclass

from data.order import SampleOrder
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage
from pipeline.training.schedule import LearningRate


@dataclass(frozen=True, slots=True)
class Part:
    """The steps of a stage that are taken with the same settings, and on to what would be its end with these."""

    steps: int
    """Of the whole stage."""
    warmup_steps: int
    """As the settings have them."""
    rate: LearningRate


@dataclass(frozen=True, slots=True)
class Begun:
    """A stage under way, whose settings are changed."""

    stage: TrainStage
    """The settings before."""
    rate: LearningRate
    """The learning rate before."""
    step: int
    """Steps taken."""
    samples: int
    """Samples trained on."""


def plan_part(stage: TrainStage, samples: int, begun: Begun | None, where: str) -> Part:
    """The next part of a stage that has `begun`, or the first one; `samples` are those of an epoch.

    Raises:
        ConfigError: it would end before it begins, its warm-up is too long, or its learning rate would be 0.
    """
    part = _next_part(stage, samples, begun, where) if begun else _first_part(stage, samples)
    rate = part.rate
    if rate.warmup_end >= part.steps:
        after = f" after step {rate.first:,}" if rate.first else ""
        raise ConfigError(
            f"{where}optimizer: the warm-up of {rate.warmup_steps} steps{after} fills the stage's {part.steps}; "
            "shorten it"
        )
    return part


def _first_part(stage: TrainStage, samples: int) -> Part:
    steps_per_epoch = samples / stage.batch.global_size
    steps = stage.steps or math.ceil((stage.epochs or 0.0) * steps_per_epoch)
    optimizer, warmup_steps = stage.optimizer, _warmup_steps(stage, samples)
    rate = LearningRate(
        steps, warmup_steps, optimizer.peak_learning_rate, optimizer.minimum_learning_rate, optimizer.schedule
    )
    return Part(steps, warmup_steps, rate)


def _next_part(stage: TrainStage, samples: int, begun: Begun, where: str) -> Part:
    steps = _steps(stage, samples, begun)
    if steps <= begun.step:
        raise ConfigError(
            f"{where}steps, epochs: the stage stands at step {begun.step:,} and would end at {steps:,}; set more"
        )
    optimizer, past = stage.optimizer, begun.stage.optimizer
    minimum, schedule = optimizer.minimum_learning_rate, optimizer.schedule
    warms_up_anew = (optimizer.warmup_steps, optimizer.warmup_epochs) != (past.warmup_steps, past.warmup_epochs)
    warmup_steps = _warmup_steps(stage, samples)
    if warms_up_anew or optimizer.peak_learning_rate != past.peak_learning_rate:
        left = warmup_steps if warms_up_anew else max(0, begun.rate.warmup_end - begun.step)
        peak = optimizer.peak_learning_rate
        rate = begun.rate.towards(begun.step, peak, left, steps=steps, minimum=minimum, schedule=schedule)
    else:
        rate = begun.rate.going_on(begun.step, steps=steps, minimum=minimum, schedule=schedule)
        _check_rate(rate, begun.step, where)
    return Part(steps, warmup_steps, rate)


def continued_order(order: SampleOrder, stage: TrainStage, step: int, where: str) -> SampleOrder:
    """The sample order from `step` on with the batch of `stage`.

    Raises:
        ConfigError: the lanes of the run do not divide that batch.
    """
    batch = stage.batch.global_size
    if batch == order.batch:
        return order
    if batch % order.lanes:
        unit = math.lcm(order.lanes, stage.batch.micro_size)
        raise ConfigError(
            f"{where}batch.global_size: the run draws its samples from {order.lanes} lanes, which go on and do not "
            f"divide {batch:,}; set a multiple of {unit:,}, such as {max(1, round(batch / unit)) * unit:,}"
        )
    return order.with_batch(batch, step)


def _steps(stage: TrainStage, samples: int, begun: Begun) -> int:
    """Steps of the whole stage: an epoch is a pass over the samples, whatever the batches were."""
    if stage.steps:
        return stage.steps
    batch, epochs = stage.batch.global_size, stage.epochs or 0.0
    if begun.samples == begun.step * batch:
        return math.ceil(epochs * (samples / batch))  # exactly as from the beginning
    return begun.step + math.ceil((epochs * samples - begun.samples) / batch)


def _warmup_steps(stage: TrainStage, samples: int) -> int:
    optimizer = stage.optimizer
    return optimizer.warmup_steps or round((optimizer.warmup_epochs or 0.0) * (samples / stage.batch.global_size))


def _check_rate(rate: LearningRate, step: int, where: str) -> None:
    """Refuse a rate that goes on and is 0, or that would rise to its minimum."""
    now, fix = rate.at(step), "optimizer.peak_learning_rate, which is then the learning rate from here on"
    if now == 0.0:
        raise ConfigError(
            f"{where}optimizer: the learning rate has decayed to 0 at step {step:,}, with which nothing is learned; "
            f"set {fix}, or optimizer.warmup_steps, over which it rises to the peak again"
        )
    if step >= rate.warmup_end and rate.schedule != "constant" and now < rate.minimum:
        raise ConfigError(
            f"{where}optimizer.minimum_learning_rate: {rate.minimum:g} is above the learning rate at step {step:,}, "
            f"{now:g}; lower it, or set {fix}"
        )
