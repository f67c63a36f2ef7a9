"""The planner's time of timm's models against what others measured, and the efficiencies fitted to a part of it.

python -m benchmarks.throughput_calibration             # the table of docs/planner.md
python -m benchmarks.throughput_calibration --fit       # fits what efficiencies.yaml calls fitted, and prints it

throughput_timm.csv has images per second that timm publishes of its own models in evaluation. The rows of ViT and
ConvNeXt are for calibration; those of CoAtNet and EfficientNet test the result and are never fitted. Models are traced
on the meta device with the casts of autocast. Needs timm: `pip install --target FOLDER --no-deps timm==1.0.31` with
FOLDER in PYTHONPATH, or the development dependencies.
"""

import argparse
import csv
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import report
from benchmarks.timm_models import import_timm
from pipeline.planner.pricing import EfficiencyFile, GpuModel, bundled_efficiencies, gpu_model, seconds
from pipeline.planner.trace.fusion import fuse
from pipeline.planner.trace.gpu_functions import GpuFunctions
from pipeline.planner.trace.operations import Operation
from pipeline.planner.trace.recording import Recording

PUBLISHED = Path(__file__).parent / "throughput_timm.csv"
CALIBRATION = ("vit", "convnext")
"""How the names begin of models whose rows may be fitted."""
_TRAINING = "training"


@dataclass(frozen=True, slots=True)
class Row:
    """One published measurement in evaluation."""

    gpu: str
    layout: str
    """`channels-last` or `NCHW`."""
    mode: str
    """`eager` or `torch.compile`."""
    torch: str
    model: str
    size: int
    batch: int
    images_per_second: float

    @property
    def compiled(self) -> bool:
        return self.mode != "eager"

    @property
    def calibrates(self) -> bool:
        return self.model.startswith(CALIBRATION)

    @property
    def channels_last(self) -> bool:
        """Inductor converts a model of mostly dense convolutions to channels-last, whatever it is given."""
        return self.layout != "NCHW" or self.compiled

    @property
    def subject(self) -> tuple[str, int, int, bool]:
        """What has to be traced for it."""
        return self.model, self.size, self.batch, self.channels_last

    @property
    def milliseconds(self) -> float:
        """Of a batch, as measured."""
        return 1e3 * self.batch / self.images_per_second


def read_rows(path: Path = PUBLISHED) -> list[Row]:
    """The measurements of evaluation in a CSV file; lines that begin with # are comments."""
    with path.open(encoding="utf-8") as file:
        found = csv.DictReader(line for line in file if not line.startswith("#"))
        return [
            Row(
                **{name: line[name] for name in ("gpu", "layout", "mode", "torch", "model")},
                size=int(line["size"]),
                batch=int(line["batch"]),
                images_per_second=float(line["images_per_second"]),
            )
            for line in found
            if _TRAINING not in line["precision"]
        ]


def trace_timm(model: str, size: int, batch: int, channels_last: bool) -> list[Operation]:
    """The operations of an eager forward in evaluation with autocast to fp16, as timm's benchmark.py runs it.

    LayerNorm computes in fp16, as with its option --fast-norm: with autocast's float32 all rows of ConvNeXt would be a
    fifth too slow on the RTX 4090, eager, and right when compiled, where it makes no difference.
    """
    timm = import_timm()
    timm.layers.norm.fast_layer_norm = _layer_norm_in_half  # timm's own asks for the autocast of the meta device
    timm.layers.set_fast_norm(True)
    sized = {} if model.startswith(("convnext", "tf_efficientnet")) else {"img_size": size}
    with torch.device("meta"):
        network = timm.create_model(model, **sized).eval()
        images = torch.empty(batch, 3, size, size)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    recording = Recording()
    with torch.no_grad(), GpuFunctions(torch.float16), recording:
        network(images)
    return recording.operations


def _layer_norm_in_half(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    x, weight, bias = (tensor.to(torch.float16) for tensor in (x, weight, bias))
    y: Tensor = torch.ops.aten.native_layer_norm(x, shape, weight, bias, epsilon)[0]
    return y


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one row: each distinct one, and how often it runs."""

    counts: tuple[tuple[Operation, int], ...]

    @classmethod
    def of(cls, operations: Iterable[Operation]) -> "Kernels":
        alike = Counter(replace(o, name="").without_identity() for o in operations)
        return cls(tuple(alike.items()))

    def seconds(self, gpu: GpuModel, *, compiled: bool) -> float:
        factor = 1.0 if compiled else gpu.efficiency.eager.value
        return factor * sum(count * seconds(operation, gpu) for operation, count in self.counts)


def _kernels_of(subject: tuple[str, int, int, bool]) -> tuple[Kernels, Kernels]:
    operations = trace_timm(*subject)
    return Kernels.of(operations), Kernels.of(fuse(operations))


def kernels_of_rows(rows: Sequence[Row], processes: int) -> dict[Row, Kernels]:
    """The kernels of each row; what several rows share is traced once."""
    subjects = sorted({row.subject for row in rows})
    if processes > 1:
        with Pool(processes) as pool:
            traced = dict(zip(subjects, pool.map(_kernels_of, subjects, chunksize=2), strict=True))
    else:
        traced = {subject: _kernels_of(subject) for subject in subjects}
    return {row: traced[row.subject][row.compiled] for row in rows}


def error(row: Row, kernels: Kernels, content: EfficiencyFile) -> float:
    """By what share the predicted time is longer than the measured one."""
    predicted = 1e3 * kernels.seconds(gpu_model(row.gpu, content), compiled=row.compiled)
    return predicted / row.milliseconds - 1


FITTED = {"law.depthwise_memory": (0.1, 1.0)}
FITTED_OF_GPU = {"matmul": (0.4, 1.3), "memory": (0.4, 0.95), "eager": (1.0, 1.5)}
"""What is fitted, within which limits: a GPU's memory does not reach the data sheet, and no kernel is faster eager."""


def fit(kernels: dict[Row, Kernels], content: EfficiencyFile) -> EfficiencyFile:
    """`content` with the fitted figures at the least mean square of the logarithmic error over the rows that calibrate.

    Each family of models counts as much as the other. By steps along one figure at a time, which become smaller.
    """
    rows = [row for row in kernels if row.calibrates]
    families = Counter(row.model[:3] for row in rows)

    def loss(tried: EfficiencyFile) -> float:
        return sum(math.log1p(error(row, kernels[row], tried)) ** 2 / families[row.model[:3]] for row in rows)

    gpus = sorted({row.gpu for row in rows})
    limits = {**FITTED, **{f"gpus.{gpu}.{name}": limit for gpu in gpus for name, limit in FITTED_OF_GPU.items()}}
    best = loss(content)
    step = 0.16
    while step > 0.002:
        moved = False
        for name, (least, most) in limits.items():
            for factor in (1 + step, 1 / (1 + step)):
                value = min(most, max(least, get_figure(content, name) * factor))
                tried = with_figure(content, name, value)
                if (found := loss(tried)) < best - 1e-9:
                    best, content, moved = found, tried, True
        if not moved:
            step /= 2
    return content


def get_figure(content: EfficiencyFile, name: str) -> float:
    """The value of a figure by its path, such as `gpus.RTX 4090.memory`."""
    for part in name.split("."):
        content = content[part] if isinstance(content, dict) else getattr(content, part)
    return float(content.value)  # type: ignore[attr-defined]


def with_figure(content: EfficiencyFile, name: str, value: float) -> EfficiencyFile:
    """`content` with another value of the figure at the path."""
    dumped = content.model_dump()
    place = dumped
    for part in name.split("."):
        place = place[part]
    place["value"] = value
    return EfficiencyFile.model_validate(dumped)


def summary(rows: Iterable[Row], errors: dict[Row, float]) -> Iterator[dict[str, Any]]:
    """Median and worst error of each family of models, GPU, layout and mode, and of each family."""
    families: dict[str, Callable[[Row], bool]] = {
        "ViT, ConvNeXt (fitted)": lambda row: row.calibrates,
        "CoAtNet": lambda row: row.model.startswith("coatnet"),
        "EfficientNetV2": lambda row: row.model.startswith("tf_efficientnet"),
    }
    kinds = sorted({(row.gpu, row.layout, row.mode, row.torch) for row in rows})
    for family, belongs in families.items():
        for gpu, layout, mode, version in [*kinds, ("all", "", "", "")]:
            found = [
                errors[row]
                for row in rows
                if belongs(row)
                and (gpu == "all" or (row.gpu, row.layout, row.mode, row.torch) == (gpu, layout, mode, version))
            ]
            if found:
                yield {
                    "models": family, "gpu": gpu, "layout": layout, "mode": mode,
                    "torch": version.removeprefix("torch "), "rows": len(found),
                    "median": f"{statistics.median(map(abs, found)):.1%}",
                    "mean": f"{statistics.mean(found):+.1%}", "worst": f"{max(found, key=abs):+.1%}",
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=PUBLISHED, help="CSV file of measurements")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="only the rows of these models")
    parser.add_argument("--gpu", help="only the rows of this GPU")
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies, and print them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for row in read_rows(arguments.rows)
        if (not arguments.only or row.model in arguments.only) and arguments.gpu in (None, row.gpu)
    ]
    if not rows:
        raise SystemExit(f"{arguments.rows}: no rows in evaluation of these models and GPUs")
    kernels = kernels_of_rows(rows, arguments.processes)
    content = bundled_efficiencies()
    if arguments.fit:
        content = fit(kernels, content)
        fitted = [*FITTED, *(f"gpus.{gpu}.{n}" for gpu in sorted({row.gpu for row in rows}) for n in FITTED_OF_GPU)]
        report("Fitted", [{"figure": name, "value": round(get_figure(content, name), 3)} for name in fitted], None)
    errors = {row: error(row, kernels[row], content) for row in rows}
    table = [
        {
            "gpu": row.gpu, "layout": row.layout, "mode": row.mode, "torch": row.torch.removeprefix("torch "),
            "model": row.model, "size": row.size, "batch": row.batch, "images/s": row.images_per_second,
            "predicted": round(row.images_per_second / (1 + errors[row]), 1), "time": f"{errors[row]:+.1%}",
        }
        for row in rows
    ]  # fmt: skip
    report("Time of a batch, predicted against measured", table, arguments.json)
    report("Errors", list(summary(rows, errors)), None)


if __name__ == "__main__":
    main()
