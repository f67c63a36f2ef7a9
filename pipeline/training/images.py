"""Images of micro-batches: normalized on the device, and back to a form that can be viewed."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images.random_erasing import ErasedRectangle

# Mean and standard deviation of ImageNet's training pixels, on the scale 0 .. 255.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


def normalized(images: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, H, W, 3) uint8 on the host -> the same shape in `dtype` on the device, normalized channel by channel."""
    on_device = torch.from_numpy(images).to(device, non_blocking=True)
    mean, std = torch.tensor(_MEAN, device=device), torch.tensor(_STD, device=device)
    return ((on_device.float() - mean) / std).to(dtype)


def erase(images: Tensor, erased: Sequence[tuple[int, ErasedRectangle]]) -> None:
    """Erase rectangles, each with its position in the micro-batch, in normalized images (B, H, W, 3), in place."""
    for position, rectangle in erased:
        values = torch.from_numpy(rectangle.values).to(images.device, images.dtype, non_blocking=True)
        images[position, rectangle.rows, rectangle.columns] = values


def viewable(images: Tensor) -> NDArray[np.uint8]:
    """The inverse of `normalized`: (B, H, W, 3) on any device -> uint8 on the host."""
    mean, std = torch.tensor(_MEAN, device=images.device), torch.tensor(_STD, device=images.device)
    pixels: NDArray[np.uint8] = (images.float() * std + mean).round().clamp(0, 255).byte().cpu().numpy()
    return pixels


def grid(images: NDArray[np.uint8], columns: int = 8, rows: int = 4) -> NDArray[np.uint8]:
    """Up to rows x columns images of (B, H, W, 3) uint8 in a grid, two pixels apart, on white."""
    _, height, width, _ = images.shape
    rows = min(rows, -(-len(images) // columns))
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for number, image in enumerate(images[: rows * columns]):
        top, left = 2 + number // columns * (height + 2), 2 + number % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image
    return canvas
