"""Pixels of micro-batches on their way to the device.

For a GPU, the readers' threads write them into pinned memory, and a stream of its own copies them while the GPU
computes the micro-batch before: inside a step the host runs ahead of the GPU, and does not wait for it.
"""

import functools
import logging

import torch
from torch import Tensor

from data.images.decode import Pixels
from data.stream import AllocatePixels, new_pixels

log = logging.getLogger(__name__)


def pixel_allocator(device: torch.device) -> AllocatePixels:
    """Allocates pixels for `pixels_to_device`, in any thread."""
    return _pinned if device.type == "cuda" else new_pixels


def pixels_to_device(pixels: Pixels, device: torch.device) -> Tensor:
    """Pixels (m, S, S, 3) uint8 on `device`, ready for what is computed next there.

    They must stay as they are until the host has read something that was computed from them: the GPU may not have
    copied them yet.
    """
    host = torch.from_numpy(pixels)
    if device.type != "cuda":
        return host.to(device)
    computing, copying = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copying):
        result = host.to(device, non_blocking=True)
    computing.wait_stream(copying)
    # Its memory belongs to the stream that copies, and would be reused there while it is still computed with.
    result.record_stream(computing)
    return result


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _pinned(shape: tuple[int, ...]) -> Pixels:
    try:
        # Torch keeps the memory for the next micro-batch when the array is gone.
        pixels: Pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        _warn_once(str(error).strip().partition("\n")[0])
        return new_pixels(shape)
    return pixels


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("memory for images cannot be pinned (%s); the GPU waits for each micro-batch to be copied", reason)
