"""Small tensors that are made on the host and used on a device."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host on `device`. A GPU copies them when it gets there, and the host does not wait.

    From pageable memory, CUDA may wait for all work before the copy. Torch reuses pinned memory once it is copied.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
