"""What `coatnet bench gpu` finds: the record that `--json` prints. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.burn_in.verdict import DeviceBits

VERSION = 1
OUT_OF_MEMORY = "the GPU's memory is full"
"""How the reason begins of a measurement that failed for that."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the measurements ran on."""

    name: str
    """As torch names it; `CPU` without a GPU."""
    is_gpu: bool
    torch: str
    kind: str | None = None
    """The key in `pipeline.ranks.gpus.PEAKS`; None for a device that is not in the table."""
    memory_bytes: int | None = None
    """Of the GPU."""
    peak: float | None = None
    """Dense bf16 operations per second by the data sheet."""
    bandwidth: float | None = None
    """Bytes per second of the GPU's own memory by the data sheet."""
    driver: str | None = None
    cuda: str | None = None
    cudnn: int | None = None
    nccl: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """How fast something ran, and how fast the data sheet would let it."""

    milliseconds: float
    operations: int
    """A multiply-add is two."""
    bytes: int
    """That have to move between the device's memory and its arithmetic, at least."""
    teraflops: float
    """10^12 operations per second."""
    gigabytes_per_second: float
    least_milliseconds: float | None = None
    """The longer one of operations at the peak and bytes at the bandwidth; None if either is not known."""
    roofline_share: float | None = None
    """Of the speed that would be, 0 to 1."""


@dataclass(frozen=True, slots=True)
class StepsRun:
    """Some steps of the stage from the seed, in a process of their own."""

    losses: tuple[float | None, ...]
    """Of the first steps; None where one is not finite."""
    fingerprint: str
    """Of weights, AdamW's moments, moving averages and BatchNorm's statistics after these steps."""
    first_step_seconds: float
    """With compilation, if there is any, and the choice of kernels."""
    step_milliseconds: float
    """Median of the `timed_steps` after them."""
    timed_steps: int
    images_per_second: float
    peak_bytes: int
    """The most that torch has allocated on the GPU; on a CPU, the most that the process has held."""
    optimizer: Work


@dataclass(frozen=True, slots=True)
class VariantRun:
    """One form of the computation."""

    name: str
    settings: Mapping[str, Any]
    run: StepsRun | None = None
    not_run: str | None = None
    """Why there is no run of it."""
    loss_difference: float | None = None
    """The largest relative difference of its first losses from those of eager; None where one is not finite, or eager
    was not measured."""


@dataclass(frozen=True, slots=True)
class EqualBits:
    """Two runs from one seed, in processes of their own."""

    deterministic: bool
    equal: bool
    first_step_that_differs: int | None = None
    """By its loss, from 1; None if only the weights after all of them differ, or nothing."""


@dataclass(frozen=True, slots=True)
class BurnIn:
    """What each device computed, again and again."""

    devices: tuple[DeviceBits, ...]


@dataclass(frozen=True, slots=True)
class PartWork:
    """Forward and backward of a part of the model, for one micro-batch, or another part of a step."""

    name: str
    work: Work


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a step, in their order."""

    parts: tuple[PartWork, ...]


@dataclass(frozen=True, slots=True)
class OperationWork:
    """Forward and backward of one operation at a shape that the stage has."""

    kind: str
    """`matmul`, `attention`, `depthwise`, `normalization`, `elementwise` or `copy`."""
    what: str
    work: Work | None = None
    not_run: str | None = None


@dataclass(frozen=True, slots=True)
class Operations:
    """The operations of a model, by its stages."""

    operations: tuple[OperationWork, ...]


@dataclass(frozen=True, slots=True)
class CopySpeed:
    """Copies between main memory and the GPU, one at a time."""

    name: str
    gigabytes_per_second: float


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of both directions and kinds of memory."""

    copies: tuple[CopySpeed, ...]


@dataclass(frozen=True, slots=True)
class Saves:
    """Two saves of a checkpoint, one after the other."""

    bytes: int
    """Of one checkpoint."""
    stall_milliseconds: tuple[float, ...]
    """That the steps waited; the first save also allocates its memory."""
    published_seconds: tuple[float, ...]
    """From the beginning of the save until the checkpoint was complete on the disk of `folder`."""
    folder: str


@dataclass(frozen=True, slots=True)
class MicroBatchAttempt:
    """Two steps of one micro-batch each."""

    micro_size: int
    fits: bool
    peak_bytes: int
    estimated_bytes: int


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A measurement that is missing, and why."""

    name: str
    reason: str
    failed: bool
    """Whether it was begun and did not succeed, rather than left out."""
    output: str = ""
    """The end of what its process printed."""

    @property
    def out_of_memory(self) -> bool:
        """Whether it failed because the GPU's memory is full."""
        return self.failed and self.reason.startswith(OUT_OF_MEMORY)


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting for the recipe."""

    setting: str
    value: Any
    reason: str
    writable: bool
    """Whether `--write` writes it: it was measured, and is not a part of a run's identity."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Of one kind of operation, over the shapes of the stage."""

    teraflops: float
    gigabytes_per_second: float
    roofline_share: float | None = None


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """An entry for a file of measured efficiencies."""

    gpu: str
    torch: str
    driver: str | None
    date: str
    model: str
    resolution: int
    micro_size: int
    precision: str
    step_utilization: float | None
    kinds: Mapping[str, Efficiency]
    copies: Mapping[str, float]
    """Gigabytes per second between main memory and the GPU."""


RECORDED = ("compile", "fused_depthwise", "activation_checkpointing", "zero_stage")
"""Settings of the stage in a record: they change its operations or its memory, and not its result."""


@dataclass(frozen=True, slots=True)
class GpuBenchmark:
    """All that one call of the command has measured."""

    version: int
    date: str
    """Of the beginning, in UTC."""
    recipe: str
    stage: str
    model: str
    resolution: int
    precision: str
    classes: int
    micro_size: int
    rounds: int
    """Micro-batches of a step here."""
    rounds_of_stage: int
    """Micro-batches of a step on each rank of the stage."""
    device: Device
    overrides: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    """Those of the stage that change its operations or its memory and not its result: `compile`, `fused_depthwise`,
    `activation_checkpointing` and `zero_stage`; None in files from before they were recorded."""
    estimated_bytes: int = 0
    """What `step.peak_bytes` should be, by `pipeline.memory_estimate` for one rank that saves nothing."""
    step: StepsRun | None = None
    utilization: float | None = None
    """MFU of `step`: the share of the GPU's peak; None for a device that is not in the table."""
    equal_bits: tuple[EqualBits, ...] = ()
    burn_in: BurnIn | None = None
    cost_of_determinism: float | None = None
    """By what share a step takes longer with `deterministic: true` than without it, on a GPU."""
    variants: tuple[VariantRun, ...] = ()
    parts: tuple[PartWork, ...] = ()
    operations: tuple[OperationWork, ...] = ()
    copies: tuple[CopySpeed, ...] = ()
    saves: Saves | None = None
    micro_batches: tuple[MicroBatchAttempt, ...] = ()
    unmeasured: tuple[Unmeasured, ...] = ()
    choices: tuple[Choice, ...] = ()
    efficiencies: Efficiencies | None = None

    @property
    def failed(self) -> list[Unmeasured]:
        """The measurements that did not succeed."""
        return [one for one in self.unmeasured if one.failed]
