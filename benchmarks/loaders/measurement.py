"""Speed, memory and start-up of one loader, measured in its own process."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from benchmarks.loaders.task import BATCH, SIZE, Images
from benchmarks.timing import cpu_seconds


def measure(start: Callable[[], Images], count: int, warm_up: int, process_began: float) -> dict[str, float]:
    """Rates over `count` batches, after `warm_up` batches that start workers, compile and fill queues.

    `process_began` is in seconds of `time.monotonic`. Memory is looked at before and after what is timed.
    """
    torch.set_num_threads(1)
    batches = _checked(start())
    next(batches)
    first_batch = time.monotonic() - process_began
    memory = [_mebibytes()]
    for _ in range(warm_up - 1):
        next(batches)
        memory.append(_mebibytes())
    began, cpu_began = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    cpu, wall = cpu_seconds() - cpu_began, time.perf_counter() - began
    for _ in range(warm_up // 2):
        memory.append(_mebibytes())
        next(batches)
    return {
        "images_per_cpu_second": count * BATCH / cpu,
        "images_per_second": count * BATCH / wall,
        "mebibytes": max(memory),
        "first_batch": first_batch,
    }


def _checked(batches: Images) -> Images:
    for images in batches:
        shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
        assert (shape, dtype) == ((BATCH, SIZE, SIZE, 3), "uint8"), f"a batch of {shape} {dtype}"
        yield images


def _mebibytes() -> float:
    """Memory of this process and all its living descendants; what they share counts once, mapped files do not count."""
    own = psutil.Process()
    return sum(_private_and_shared(process.pid) for process in (own, *own.children(recursive=True))) / 2**10


def _private_and_shared(pid: int) -> int:
    """KiB, with the proportional share of what is shared with other processes."""
    return sum(_fields(pid, "Pss_Anon:", "Pss_Shmem:"))


def _fields(pid: int, *names: str) -> Iterator[int]:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(names):
            yield int(line.split()[1])
