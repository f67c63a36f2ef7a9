"""Seconds of something that a device computes, and what a data sheet says that it takes at least."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.gpu_benchmark.record import Device, Work
from pipeline.recipe.schema import Precision


def wait_for(device: torch.device) -> None:
    """Return when `device` has computed all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    run: Callable[[], object], device: torch.device, *, rounds: int = 7, warm_up: int = 2, most_seconds: float = 1.5
) -> float:
    """The median time of `run`, after calls for allocators, compilation and the choice of kernels.

    A GPU's time is measured by events in its stream. Calls that take long are repeated less often, so that all of them
    take about `most_seconds`, but twice at least.
    """
    for _ in range(warm_up):
        run()
    wait_for(device)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < rounds and sum(seconds) < most_seconds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least time of work, by the peaks of a data sheet (Williams et al., CACM 52(4), 2009)."""

    operations_per_second: float | None
    bytes_per_second: float | None

    @classmethod
    def of(cls, device: Device, precision: Precision) -> "Roofline":
        """That of a device; none for fp32, since the peaks of the table are those of bf16."""
        if precision == "fp32":
            return cls(None, None)
        return cls(device.peak, device.bandwidth)

    def work(self, seconds: float, operations: int, size: int) -> Work:
        """Work of `operations` and `size` bytes that took `seconds`."""
        least = None
        if self.operations_per_second and self.bytes_per_second:
            least = max(operations / self.operations_per_second, size / self.bytes_per_second)
        return Work(
            milliseconds=1e3 * seconds,
            operations=operations,
            bytes=size,
            teraflops=operations / seconds / 1e12,
            gigabytes_per_second=size / seconds / 1e9,
            least_milliseconds=1e3 * least if least is not None else None,
            roofline_share=least / seconds if least is not None else None,
        )
