"""Pixels to network input: crops, resize and flip, all uint8 channels-last; normalization happens on the device."""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from data.decode import Pixels
from data.random_augment import RandomAugment

# The reader has its own threads: OpenCV's would fight them for the cores. (torch takes none to resize one picture.)
cv2.setNumThreads(0)


def resize(pixels: Pixels, size: int) -> Pixels:
    """Square (size, size, 3) by the antialiased triangle filter, which is Pillow's BILINEAR to a level.

    torch's version for uint8 channels-last is faster than OpenCV's area averaging and than Pillow (docs/benchmarks.md).
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    # Only contiguous pixels get torch's fast kernel.
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def center_crop(pixels: Pixels, size: int) -> Pixels:
    """The central square whose side is size / (size + 32) of the shorter side (paper: "center crop")."""
    height, width = pixels.shape[:2]
    side = max(1, round(min(height, width) * size / (size + 32)))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def random_window(height: int, width: int, area: tuple[float, float], rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of `area` (least, greatest) of a picture, of aspect ratio 3/4 to 4/3 (Szegedy et al., 2014).

    Ten tries to fit one in; then the largest centred window of a permitted ratio.
    """
    least, greatest = area
    for _ in range(10):
        share, log_ratio, down, along = rng.random(4).tolist()  # one call: numpy's cost by the call
        target = height * width * (least + share * (greatest - least))
        ratio = (4 / 3) ** (2 * log_ratio - 1)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(along * (width - w + 1))
            return slice(top, top + h), slice(left, left + w)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    top, left = (height - h) // 2, (width - w) // 2
    return slice(top, top + h), slice(left, left + w)


@dataclass(frozen=True, slots=True)
class TrainTransform:
    """One training view of a picture; draws from the sample's own generator only.

    `crop` "random" cuts a window of `crop_area` of the picture, "whole" resizes all of it. Resized and flipped pictures
    go through `random_augment`.
    """

    size: int
    crop: Literal["random", "whole"] = "random"
    crop_area: tuple[float, float] = (0.05, 1.0)
    flip: bool = True
    random_augment: RandomAugment | None = None

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """(H, W, 3) -> (size, size, 3), both uint8."""
        if self.crop == "random":
            height, width = pixels.shape[:2]
            rows, columns = random_window(height, width, self.crop_area, rng)
            pixels = pixels[rows, columns]
        pixels = resize(pixels, self.size)
        if self.flip and rng.random() < 0.5:
            pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)  # many times as fast as copying out of a mirrored view
        return self.random_augment(pixels, rng) if self.random_augment else pixels


@dataclass(frozen=True, slots=True)
class EvaluationTransform:
    """The evaluation view: `crop` "center" (side S / (S + 32)) or "whole"."""

    size: int
    crop: Literal["center", "whole"] = "center"

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) -> (size, size, 3), both uint8."""
        return resize(center_crop(pixels, self.size) if self.crop == "center" else pixels, self.size)
