"""Images of micro-batches: normalized on the device, and back to a form that can be viewed."""

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images.random_erasing import ErasedRectangle
from models.host_tensors import to_device
from models.model_facts import Preprocessing
from pipeline.training.pixels import pixels_to_device

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
    on_device = pixels_to_device(images, device)
    mean_levels, std_levels = _levels(tuple(mean), device), _levels(tuple(std), device)
    return ((on_device.float() - mean_levels) / std_levels).to(dtype)


def erase(images: Tensor, erased: Sequence[tuple[int, ErasedRectangle]]) -> None:
    """Erase rectangles, each with its position in the micro-batch, in normalized images (B, H, W, 3), in place."""
    if not erased:
        return
    values = [torch.from_numpy(rectangle.values) for _, rectangle in erased]
    flat = to_device(torch.cat([one.flatten() for one in values]), images.device).to(images.dtype)
    parts = torch.split(flat, [one.numel() for one in values])
    for (position, rectangle), one, part in zip(erased, values, parts, strict=True):
        images[position, rectangle.rows, rectangle.columns] = part.view(one.shape)


def viewable(images: Tensor) -> NDArray[np.uint8]:
    """The inverse of `normalized`: (B, H, W, 3) on any device -> uint8 on the host."""
    mean, std = _levels(_MEAN, images.device), _levels(_STD, images.device)
    pixels: NDArray[np.uint8] = (images.float() * std + mean).round().clamp(0, 255).byte().cpu().numpy()
    return pixels


@functools.cache
def _levels(shares: tuple[float, ...], device: torch.device) -> Tensor:
    """Shares of the brightest level, as float32 levels 0 .. 255. On a GPU once, as making it there waits."""
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
