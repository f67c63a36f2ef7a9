"""Copies between main memory and the GPU."""

import torch

from pipeline.gpu_benchmark.record import Copies, CopySpeed
from pipeline.gpu_benchmark.subject import Subject, join
from pipeline.gpu_benchmark.timing import median_seconds

_BYTES = 1 << 28


def measure_copies(subject: Subject) -> Copies:
    """Both directions, from pageable memory, which micro-batches are in, and from pinned, which saves copy to."""
    device = join(subject.plan()).device
    assert device.type == "cuda", "there is nothing to copy to"
    on_device = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.zeros(_BYTES, dtype=torch.uint8)
    found = []
    for kind, memory in (("pageable", pageable), ("pinned", pageable.pin_memory())):
        to_device = median_seconds(lambda host=memory: on_device.copy_(host, non_blocking=True), device)  # type: ignore[misc]
        to_host = median_seconds(lambda host=memory: host.copy_(on_device, non_blocking=True), device)  # type: ignore[misc]
        found.append(CopySpeed(f"{kind} memory to the GPU", _BYTES / to_device / 1e9))
        found.append(CopySpeed(f"the GPU to {kind} memory", _BYTES / to_host / 1e9))
    return Copies(tuple(found))
