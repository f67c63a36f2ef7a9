"""The sequence of measurements: what is most valuable first, until the time is over."""

import datetime
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.compiler import check_compiler
from pipeline.errors import ConfigError
from pipeline.fused_kernels import check_fused_depthwise, check_kernel_device
from pipeline.gpu_benchmark.choices import choices, efficiencies
from pipeline.gpu_benchmark.micro_batches import first_size, search
from pipeline.gpu_benchmark.processes import Processes
from pipeline.gpu_benchmark.record import (
    RECORDED,
    VERSION,
    BurnIn,
    Copies,
    Device,
    EqualBits,
    GpuBenchmark,
    MicroBatchAttempt,
    Operations,
    Parts,
    Saves,
    StepsRun,
    Unmeasured,
    VariantRun,
)
from pipeline.gpu_benchmark.subject import MeasuredStage, rounds_of
from pipeline.gpu_benchmark.variants import (
    EAGER,
    VARIANTS,
    ExecutionVariant,
    all_settings,
    is_that_of,
    loss_difference,
    unknown_setting,
)
from pipeline.memory_estimate import estimate_memory
from pipeline.monitoring.utilization import operations_per_image
from pipeline.plan import TrainPlan
from pipeline.recipe.schema import Recipe, TrainStage

Record = TypeVar("Record")

OPTIONAL = ("equal-bits", "burn-in", "parts", "operations", "copies", "variants", "saves", "micro-batch")
"""What is measured after the device and a step, in this order: compilation, which may take what is left, comes late."""
_STEPS_SECONDS, _COMPILED_SECONDS, _SHORT_SECONDS, _SAVE_SECONDS, _BURN_IN_SECONDS = 180.0, 900.0, 120.0, 300.0, 180.0
_USABLE = 0.95
"""Share of a GPU's memory with which a search for the largest micro-batch begins."""


@dataclass(frozen=True, slots=True)
class BenchmarkRequest:
    """What a person asks for.

    Args:
        recipe: with the stage.
        stage: name of the training stage.
        classes: of its data.
        rounds: micro-batches of a step.
        minutes: for all measurements.
        only: of `OPTIONAL`.
        scratch: an existing folder for checkpoints and other files; what is written there is removed.
        overrides: as given, for the record.
    """

    recipe: Recipe
    stage: str
    classes: int
    rounds: int
    minutes: float
    scratch: Path
    only: Collection[str] = OPTIONAL
    overrides: tuple[str, ...] = ()

    @property
    def settings(self) -> TrainStage:
        """Those of the stage."""
        stage = self.recipe.stages[self.stage]
        assert isinstance(stage, TrainStage)
        return stage

    @property
    def subject(self) -> MeasuredStage:
        """The stage as it is in the recipe."""
        return MeasuredStage(self.recipe.model_dump(mode="json"), self.stage, self.classes, self.rounds)


def measure(
    request: BenchmarkRequest,
    *,
    show: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda text: None,
) -> GpuBenchmark:
    """Measure, and choose settings from what is found.

    Args:
        request: what to measure.
        show: called every half a second with what runs at present.
        say: called with a line when a measurement has ended.

    Raises:
        ConfigError: settings that contradict each other.
    """
    plan = request.subject.plan()
    with tempfile.TemporaryDirectory(prefix="coatnet-bench-", dir=request.scratch) as scratch:
        session = _Session(request, plan, Processes(Path(scratch), 60 * request.minutes, show), say)
        device = session.run("device", Device, "device", session.subject, _SHORT_SECONDS)
        session.measure_all(device)
    found = GpuBenchmark(
        version=VERSION,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        recipe=request.recipe.name,
        stage=request.stage,
        model=plan.stage.model.name,
        resolution=plan.stage.resolution,
        precision=plan.stage.precision,
        classes=request.classes,
        micro_size=plan.stage.batch.micro_size,
        rounds=request.rounds,
        rounds_of_stage=rounds_of(request.settings),
        device=device or Device("unknown", False, "unknown"),
        overrides=request.overrides,
        settings={name: getattr(plan.stage, name) for name in RECORDED},
        unmeasured=tuple(session.unmeasured),
        **session.found,
    )
    found = replace(found, **_by_estimate(found, plan))
    return replace(found, choices=choices(found, request.settings), efficiencies=efficiencies(found))


def _by_estimate(found: GpuBenchmark, plan: TrainPlan) -> dict[str, Any]:
    step, peak = found.step, found.device.peak
    return {
        "estimated_bytes": _estimate(plan, found.device.is_gpu),
        "utilization": operations_per_image(plan) * step.images_per_second / peak if step and peak else None,
    }


def _estimate(plan: TrainPlan, on_gpu: bool, micro_size: int | None = None) -> int:
    """Bytes that one rank should hold that saves nothing."""
    batch = plan.stage.batch.model_copy(update={"micro_size": micro_size or plan.stage.batch.micro_size})
    stage = plan.stage.model_copy(update={"batch": batch})
    memory = estimate_memory(stage, len(plan.classes), 1, on_cpu=not on_gpu)
    return memory.device if on_gpu else memory.host - memory.staging


@dataclass
class _Session:
    request: BenchmarkRequest
    plan: TrainPlan
    processes: Processes
    say: Callable[[str], None]
    found: dict[str, Any] = field(default_factory=dict)
    """Fields of `GpuBenchmark`."""
    unmeasured: list[Unmeasured] = field(default_factory=list)

    @property
    def subject(self) -> MeasuredStage:
        return self.request.subject

    def run(
        self, name: str, kind: type[Record], measurement: str, subject: MeasuredStage, most: float
    ) -> Record | None:
        """The record of a measurement; without one, the reason is noted."""
        if subject.changes.get("compile", self.plan.stage.compile):
            most = max(most, _COMPILED_SECONDS)
        result = self.processes.measure(name, kind, measurement, subject, most)
        if not isinstance(result, Unmeasured):
            self.say(f"{name}: done")
            return result
        self.leave_out(name, result.reason, failed=result.failed, output=result.output)
        return None

    def leave_out(self, name: str, reason: str, *, failed: bool = False, output: str = "") -> None:
        """Note that there is no such measurement."""
        self.say(f"{name}: {'failed' if failed else 'not measured'}: {reason}")
        self.unmeasured.append(Unmeasured(name, reason, failed, output))

    def measure_all(self, device: Device | None) -> None:
        """All measurements that are asked for, as far as the time allows."""
        names = [name for name in OPTIONAL if name in self.request.only]
        if device is None:
            for name in ("step", *names):
                self.leave_out(name, "nothing is known of the device")
            return
        step = self.steps("step", {})
        self.found["step"] = step
        for name in names:
            if step is None and name in ("equal-bits", "variants", "saves"):
                self.leave_out(name, "not even a step is measured")
            elif not device.is_gpu and name in ("copies", "micro-batch"):
                self.leave_out(name, "not on a CPU")
            elif name == "equal-bits" and step is not None:
                self.equal_bits(step, device)
            elif name == "variants" and step is not None:
                self.variants(step, device)
            elif name == "micro-batch":
                self.micro_batches(device)
            else:
                self.simple(name)

    def steps(self, name: str, changes: dict[str, Any]) -> StepsRun | None:
        """Steps of the stage with `changes`."""
        subject = replace(self.subject, changes=changes)
        return self.run(name, StepsRun, "steps", subject, _STEPS_SECONDS)

    def equal_bits(self, step: StepsRun, device: Device) -> None:
        """Two runs with `deterministic` and two without, in turn; on a CPU it costs nothing."""
        own = self.plan.stage.deterministic
        runs: dict[bool, list[StepsRun]] = {own: [step], not own: []}
        for value in (not own, own, not own):
            run = self.steps(f"equal bits, deterministic: {str(value).lower()}", {"deterministic": value})
            if run is not None:
                runs[value].append(run)
        self.found["equal_bits"] = tuple(
            _compared(value, *pair) for value in (True, False) if len(pair := runs[value]) == 2
        )
        pairs = list(zip(runs[True], runs[False], strict=False))
        if pairs and device.is_gpu:
            spent = [sum(run.step_milliseconds for run in side) for side in zip(*pairs, strict=True)]
            self.found["cost_of_determinism"] = spent[0] / spent[1] - 1

    def variants(self, step: StepsRun, device: Device) -> None:
        """Every variant that the stage can have; that of the stage is measured already."""
        found: list[VariantRun] = []
        for variant in VARIANTS:
            run = self._variant(variant, step, device)
            eager = next((one.run for one in [*found, run] if one.name == EAGER.name), None)
            if run.run is not None and eager is not None:
                run = replace(run, loss_difference=loss_difference(run.run, eager))
            found.append(run)
        self.found["variants"] = tuple(found)

    def _variant(self, variant: ExecutionVariant, step: StepsRun, device: Device) -> VariantRun:
        if (setting := unknown_setting(variant)) is not None:
            return VariantRun(variant.name, variant.settings, not_run=f"stages have no setting {setting}")
        settings = all_settings(variant)
        if is_that_of(variant, self.plan.stage):
            return VariantRun(variant.name, settings, step)
        try:
            if settings["compile"]:
                check_compiler("")
            stage = replace(self.subject, changes=settings).plan().stage
            check_fused_depthwise(stage, "")
            check_kernel_device(stage, on_gpu=device.is_gpu, where="")
        except ConfigError as error:
            return VariantRun(variant.name, settings, not_run=str(error))
        run = self.steps(f"variant {variant.name}", settings)
        return VariantRun(variant.name, settings, run, None if run else self.unmeasured[-1].reason)

    def simple(self, name: str) -> None:
        """What one process finds out."""
        if name == "burn-in":
            self.found["burn_in"] = self.run(name, BurnIn, name, self.subject, _BURN_IN_SECONDS)
        if name == "parts" and (parts := self.run(name, Parts, name, self.subject, _SHORT_SECONDS)):
            self.found["parts"] = parts.parts
        if name == "operations" and (found := self.run(name, Operations, name, self.subject, _SHORT_SECONDS)):
            self.found["operations"] = found.operations
        if name == "copies" and (copies := self.run(name, Copies, name, self.subject, _SHORT_SECONDS)):
            self.found["copies"] = copies.copies
        if name == "saves":
            self.found["saves"] = self.run(name, Saves, name, self.subject, _SAVE_SECONDS)

    def micro_batches(self, device: Device) -> None:
        """The largest micro-batch, of steps that have one."""
        attempts: list[MicroBatchAttempt] = []
        one, two = (_estimate(self.plan, True, size) for size in (1, 2))

        def estimate(size: int) -> int:
            return one + (size - 1) * (two - one)  # activations alone grow with it

        def fits(size: int) -> bool | None:
            subject = replace(self.subject, micro_size=size, rounds=1)
            attempt = self.run(f"micro-batch of {size}", MicroBatchAttempt, "micro-batch", subject, _STEPS_SECONDS)
            if attempt is None:
                return None
            attempts.append(replace(attempt, estimated_bytes=estimate(size)))
            return attempt.fits

        usable = int(_USABLE * (device.memory_bytes or 0))
        search(first_size(estimate, usable), fits)
        self.found["micro_batches"] = tuple(sorted(attempts, key=lambda attempt: attempt.micro_size))


def _compared(deterministic: bool, one: StepsRun, other: StepsRun) -> EqualBits:
    pairs = zip(one.losses, other.losses, strict=True)
    differs = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), None)
    return EqualBits(deterministic, differs is None and one.fingerprint == other.fingerprint, differs)
