"""Interleaved timing, peak memory, and tables of the results."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from pipeline.host import processor_name


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one contestant, round by round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed_against(self, other: "Timing") -> float:
        """How many times as fast as `other`: the median of the ratios within a round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the contestants in turn, so that other load on the machine affects all of them alike.

    Each runs twice before: for allocators, compilation and kernel selection. `clock` gives seconds;
    `time.process_time` counts those of the processor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-2, rounds):
        for name, run in contestants.items():
            _wait(device)
            began = clock()
            run()
            _wait(device)
            if number >= 0:
                seconds[name].append(clock() - began)
    return {name: Timing(values) for name, values in seconds.items()}


def peak_mebibytes(run: Callable[[], object], device: torch.device) -> float:
    """Memory that `run` adds at its peak: in the GPU's allocator, or to the maximum resident size of this process.

    On a CPU it is meaningful once per process, before anything else has used much memory.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the maximum to the present size
    before = _maximum_size()
    run()
    return (_maximum_size() - before) / 2**10


def cpu_seconds() -> float:
    """User and system time of this process and of all its living descendants."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def machine(device: torch.device) -> str:
    """The machine in a few words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print the rows as a table, and write them as JSON to `path`."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)
    if path is not None:
        path.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


def _maximum_size() -> int:
    """Maximum resident size in KiB, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
