"""What follows from the measurements: settings for the recipe, and an entry for a file of efficiencies."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.gpu_benchmark.record import Choice, Efficiencies, Efficiency, GpuBenchmark, VariantRun, Work
from pipeline.gpu_benchmark.variants import EAGER, ROUNDING
from pipeline.memory_estimate import estimate_memory
from pipeline.recipe.schema import TrainStage

_WORTH = 1.03
"""A variant that is faster by less is not worth the time of compilation; medians of steps differ by as much."""
_ROOM = 0.9
"""Share of a GPU's memory that a stage may need, by what was measured, beside fragments and buffers of kernels."""


def choices(found: GpuBenchmark, stage: TrainStage) -> tuple[Choice, ...]:
    """Settings for the stage, only where they were measured."""
    return (*_variant(found), *_deterministic(found, stage), *_checkpointing(found, stage), *_micro_size(found))


def _variant(found: GpuBenchmark) -> Iterator[Choice]:
    """The settings of the fastest variant whose losses are those of eager up to rounding."""
    ran = [one for one in found.variants if one.run is not None]
    eager = next((one for one in ran if one.name == EAGER.name), None)
    if eager is None or len(ran) < 2:
        return
    right = [one for one in ran if _is_right(one, found)]
    if not right:
        return
    fastest = max(right, key=lambda one: _speed(one, eager))
    chosen = fastest if _speed(fastest, eager) >= _WORTH else eager
    others = [one for one in ran if one is not chosen]
    compared = "; ".join(_described(one, eager, found) for one in (*([chosen] if chosen is not eager else []), *others))
    for setting, value in chosen.settings.items():
        if any(one.settings[setting] != value for one in ran):
            yield Choice(setting, value, compared, writable=True)


def _is_right(one: VariantRun, found: GpuBenchmark) -> bool:
    difference = one.loss_difference
    return difference is not None and difference <= ROUNDING[found.precision]


def _speed(one: VariantRun, eager: VariantRun) -> float:
    """How many times as fast as eager."""
    assert one.run is not None
    assert eager.run is not None
    return eager.run.step_milliseconds / one.run.step_milliseconds


def _described(one: VariantRun, eager: VariantRun, found: GpuBenchmark) -> str:
    assert one.run is not None
    if one is eager:
        return f"eager {one.run.step_milliseconds:.1f} ms a step"
    text = f"{one.name} {_speed(one, eager):.2f} times as fast as eager, first step {one.run.first_step_seconds:.0f} s"
    return text if _is_right(one, found) else f"{text}, but its losses differ from those of eager"


def _deterministic(found: GpuBenchmark, stage: TrainStage) -> Iterator[Choice]:
    """The recipe's own value: the price is a person's to pay."""
    bits = {one.deterministic: one.equal for one in found.equal_bits}
    if not bits or not found.device.is_gpu:  # on CPUs it has no effect
        return
    cost = found.cost_of_determinism
    price = "" if cost is None else f"; a step takes {abs(cost):.1%} {'longer' if cost >= 0 else 'less'} with true"
    said = ", ".join(f"{str(value).lower()} {'equal' if equal else 'DIFFERENT'} bits" for value, equal in bits.items())
    kept = stage.deterministic
    if bits.get(True) is False:
        said += " (true promises equal ones on one kind of machine: please report this with the output of --json)"
    yield Choice("deterministic", kept, f"as in the recipe; two runs have with {said}{price}", writable=kept in bits)


def _checkpointing(found: GpuBenchmark, stage: TrainStage) -> Iterator[Choice]:
    """None where the memory allows it, more where it does not suffice."""
    memory, step = found.device.memory_bytes, found.step
    full = any(one.name == "step" and one.out_of_memory for one in found.unmeasured)
    if memory is None or (step is None and not full):
        return
    # A single rank holds all of what the stage's ranks share, so the estimate is for theirs.
    excess = step.peak_bytes / found.estimated_bytes if step and found.estimated_bytes else 1.0

    def need(policy: Any) -> float:
        changed = stage.model_copy(update={"activation_checkpointing": policy})
        return excess * estimate_memory(changed, found.classes, stage.resources.ranks).device

    policies = [policy for policy in ("none", "mbconv", "every_block") if need(policy) <= _ROOM * memory]
    own, ranks = stage.activation_checkpointing, stage.resources.ranks
    if full and need(own) > _ROOM * memory and policies and policies[0] != own:
        reason = f"a step does not fit with {own}, and by estimate {need(policies[0]) / 1e9:.1f} GB do on {ranks} ranks"
        yield Choice("activation_checkpointing", policies[0], reason, writable=False)
    elif not full and own != "none" and "none" in policies:
        reason = (
            f"by what was measured, a rank of {ranks} needs {need('none') / 1e9:.1f} of {memory / 1e9:.1f} GB without "
            "recomputing anything"
        )
        yield Choice("activation_checkpointing", "none", reason, writable=False)


def _micro_size(found: GpuBenchmark) -> Iterator[Choice]:
    fitting = [one for one in found.micro_batches if one.fits]
    if not fitting:
        return
    best, beyond = fitting[-1], next((one.micro_size for one in found.micro_batches if not one.fits), None)
    limit = f", {beyond} does not fit" if beyond else ", and the next one was not tried"
    reason = (
        f"the largest that ran on one rank{limit}; it held {best.peak_bytes / 1e9:.1f} GB, by estimate "
        f"{best.estimated_bytes / 1e9:.1f}. BatchNorm sees it: a part of a run's identity, and of its result"
    )
    yield Choice("batch.micro_size", best.micro_size, f"at most; {reason}", writable=False)


def efficiencies(found: GpuBenchmark) -> Efficiencies | None:
    """The entry for this device; None if no operation was measured."""
    kinds: dict[str, dict[str, Work]] = defaultdict(dict)
    for one in found.operations:
        if one.work is not None:
            where = one.what.split()[0]  # of two forms of attention at one place, the faster
            before = kinds[one.kind].get(where)
            if one.kind != "attention" or before is None or one.work.milliseconds < before.milliseconds:
                key = where if one.kind == "attention" else one.what
                kinds[one.kind][key] = one.work
    if not kinds:
        return None
    device = found.device
    return Efficiencies(
        gpu=device.name,
        torch=device.torch,
        driver=device.driver,
        date=found.date,
        model=found.model,
        resolution=found.resolution,
        micro_size=found.micro_size,
        precision=found.precision,
        step_utilization=found.utilization,
        kinds={kind: _together(works.values()) for kind, works in kinds.items()},
        copies={one.name: one.gigabytes_per_second for one in found.copies},
    )


def _together(works: Iterable[Work]) -> Efficiency:
    """That of all works one after the other."""
    works = list(works)
    milliseconds = sum(work.milliseconds for work in works)
    least = [work.least_milliseconds for work in works if work.least_milliseconds is not None]
    return Efficiency(
        teraflops=sum(work.operations for work in works) / milliseconds / 1e9,
        gigabytes_per_second=sum(work.bytes for work in works) / milliseconds / 1e6,
        roofline_share=sum(least) / milliseconds if len(least) == len(works) else None,
    )
