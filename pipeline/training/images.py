"""Images of micro-batches: normalized on the device, and back to a form that can be viewed."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.model_facts import Preprocessing

# Mean and standard deviation of ImageNet's training pixels, on the scale 0 .. 1.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def imagenet_preprocessing(image_size: int, crop: Literal["center", "whole"]) -> Preprocessing:
    """What a stage of this resolution and `data.evaluation_crop` does with images in evaluation."""
    return Preprocessing(image_size, crop, _MEAN, _STD)


def normalized(
    images: NDArray[np.uint8],
    device: torch.device,
    dtype: torch.dtype,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
) -> Tensor:
    """(B, H, W, 3) uint8 on the host -> the same shape in `dtype` on the device, normalized channel by channel.

    `mean` and `std` are on the scale 0 .. 1, by default those of training.
    """
    on_device = torch.from_numpy(images).to(device, non_blocking=True)
    return ((on_device.float() - _levels(mean, device)) / _levels(std, device)).to(dtype)


def viewable(images: Tensor) -> NDArray[np.uint8]:
    """The inverse of `normalized`: (B, H, W, 3) on any device -> uint8 on the host."""
    mean, std = _levels(_MEAN, images.device), _levels(_STD, images.device)
    pixels: NDArray[np.uint8] = (images.float() * std + mean).round().clamp(0, 255).byte().cpu().numpy()
    return pixels


def _levels(shares: Sequence[float], device: torch.device) -> Tensor:
    """Shares of the brightest level, as float32 levels 0 .. 255."""
    return torch.tensor([255 * share for share in shares], device=device)


def grid(images: NDArray[np.uint8], columns: int = 8, rows: int = 4) -> NDArray[np.uint8]:
    """Up to rows x columns images of (B, H, W, 3) uint8 in a grid, two pixels apart, on white."""
    _, height, width, _ = images.shape
    rows = min(rows, -(-len(images) // columns))
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for number, image in enumerate(images[: rows * columns]):
        top, left = 2 + number // columns * (height + 2), 2 + number % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image
    return canvas
