"""Copies between main memory and the GPU."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.gpu_benchmark.record import Copies, CopySpeed
from pipeline.gpu_benchmark.subject import MeasuredStage, join
from pipeline.gpu_benchmark.timing import median_seconds

_BYTES = 1 << 28


def measure_copies(subject: MeasuredStage) -> Copies:
    """Both directions, with pageable memory and with pinned, which micro-batches come from and saves go to."""
    device = join(subject.plan()).device
    assert device.type == "cuda", "there is nothing to copy to"
    return copy_speeds(device, _BYTES, torch.Tensor.pin_memory)


def copy_speeds(device: torch.device, size: int, pin: Callable[[Tensor], Tensor]) -> Copies:
    """The speeds of copies of `size` bytes, with `pin` to make pinned memory of pageable."""
    on_device, pageable = (torch.zeros(size, dtype=torch.uint8, device=place) for place in (device, "cpu"))
    found = []
    for kind, host in (("pageable", pageable), ("pinned", pin(pageable))):
        to_device = median_seconds(partial(on_device.copy_, host, non_blocking=True), device)
        to_host = median_seconds(partial(host.copy_, on_device, non_blocking=True), device)
        found.append(CopySpeed(f"{kind} memory to the GPU", size / to_device / 1e9))
        found.append(CopySpeed(f"the GPU to {kind} memory", size / to_host / 1e9))
    return Copies(tuple(found))
