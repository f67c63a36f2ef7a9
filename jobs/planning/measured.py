"""Measurements of a GPU by `coatnet bench gpu`, for a plan."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import raise_if_passing
from data.files.json_records import parse_json
from pipeline.errors import ConfigError
from pipeline.gpu_benchmark.record import RECORDED, GpuBenchmark
from pipeline.planner.figures import Figure
from pipeline.planner.hardware import Cluster
from pipeline.planner.pricing import EfficiencyFile, GpuEfficiency, bundled_efficiencies
from pipeline.planner.step_estimate import MeasuredSpeed, estimate_step
from pipeline.ranks.gpus import known_name
from pipeline.recipe.schema import TrainStage

_VARIATION = 0.1
"""What another micro-batch, or other settings than the measured ones, may change, as a share of the time."""
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class MeasuredGpu:
    """A GPU as it was measured."""

    found: GpuBenchmark
    path: Path

    @property
    def name(self) -> str:
        """As torch names it."""
        return self.found.device.name

    def efficiencies(self) -> EfficiencyFile | None:
        """The efficiencies that come with the program, with those measured in their place; None if none were."""
        measured, content = self.found.efficiencies, bundled_efficiencies()
        kind = known_name(self.name)
        if measured is None or kind is None:
            return None
        origin = f"coatnet bench gpu on {measured.gpu}, {measured.date}"
        own = content.gpus.get(kind, content.other)
        shares = {name: one.roofline_share for name, one in measured.kinds.items()}
        update = {}
        for field, name in (("matmul", "matmul"), ("memory", "copy")):
            share = shares.get(name)
            if share is not None:
                update[field] = Figure(value=share, origin=origin)
        changed: GpuEfficiency = own.model_copy(update=update)
        return content.model_copy(update={"gpus": content.gpus | {kind: changed}})

    def speed(self, stage: TrainStage, cluster: Cluster) -> MeasuredSpeed | None:
        """How the measured step compares with the estimate for it; None if it is of another model or precision.

        Raises:
            ConfigError: another GPU is planned for.
        """
        found = self.found
        kind = known_name(self.name)
        if kind != cluster.gpu.kind:
            raise ConfigError(
                f"--measured {self.path}: is of {self.name}, and --gpu is {cluster.gpu.kind}; leave one out"
            )
        step = found.step
        same = (found.model, found.resolution, found.precision) == (stage.model.name, stage.resolution, stage.precision)
        if step is None or not same:
            return None
        size, settings = found.micro_size * found.rounds, dict(found.settings or {})
        batch = stage.batch.model_copy(update={"global_size": size, "micro_size": found.micro_size})
        as_measured = stage.model_copy(update={**settings, "batch": batch})
        alone = estimate_step(as_measured, found.classes, cluster.with_gpus(1))
        factor = step.step_milliseconds / 1e3 / alone.computing.value
        exactly = found.micro_size == stage.batch.micro_size and settings == {
            name: getattr(stage, name) for name in RECORDED
        }
        return MeasuredSpeed(factor, 0.0 if exactly else _VARIATION, f"coatnet bench gpu, {found.date}")

    def remark(self, stage: TrainStage, speed: MeasuredSpeed | None) -> str:
        """What of the file is used for a plan of `stage`, whose `speed` it gave or did not."""
        found, used = self.found, "its efficiencies are" if self.efficiencies() else "nothing of it is"
        if speed is None:
            what = f"{found.model} at {found.resolution} pixels in {found.precision}"
            why = "has no step" if found.step is None else f"has a step of {what}"
            return f"{self.path}: {used} used; it {why}, so the time of this one is an estimate"
        if not speed.variation:
            return f"{self.path}: the time of a step is as measured, {speed.origin}"
        return (
            f"{self.path}: the time of a step follows from one with other settings or micro-batches, {speed.origin}; "
            f"{speed.variation:.0%} more or less are assumed"
        )


def measured_gpu(path: Path) -> MeasuredGpu:
    """The measurements in a file.

    Raises:
        ConfigError: it cannot be read, is none, or is of no GPU that is known.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError("it is too large")
        found = parse_json(GpuBenchmark, content)
    except (OSError, ValueError) as error:
        raise_if_passing(error)
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--measured {path}: {reason}; it must be a file that `coatnet bench gpu --out` has written"
        ) from None
    if not found.device.is_gpu or known_name(found.device.name) is None:
        raise ConfigError(f"--measured {path}: is of {found.device.name}, which is no GPU with a known data sheet")
    return MeasuredGpu(found, path)
