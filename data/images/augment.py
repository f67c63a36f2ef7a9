"""Pixels to network input: crop, resize and flip in uint8 channels-last; normalization happens on the device."""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from data.images.color_jitter import ColorJitter
from data.images.decode import Pixels
from data.images.random_augment import RandomAugment
from data.images.random_erasing import RandomErasing
from data.images.region_frame import Window

# The reader has its own threads, with which OpenCV's would compete. (torch resizes a single image in one thread.)
cv2.setNumThreads(0)


def resize(pixels: Pixels, size: int) -> Pixels:
    """Square (size, size, 3) with the antialiased triangle filter, within one level of Pillow's BILINEAR.

    torch's version for uint8 channels-last is faster than OpenCV's area averaging and than Pillow (docs/benchmarks.md).
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    # torch's fast kernel needs contiguous pixels.
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def center_crop(pixels: Pixels, size: int) -> Pixels:
    """The central square whose side is size / (size + 32) of the shorter side (paper: "center crop")."""
    height, width = pixels.shape[:2]
    side = max(1, round(min(height, width) * size / (size + 32)))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def center_crop_share(size: int) -> float:
    """Share of a square picture that `center_crop` leaves; of others it is less."""
    return (size / (size + 32)) ** 2


def random_window(height: int, width: int, area: tuple[float, float], rng: np.random.Generator) -> Window:
    """Rows and columns of `area` (least, greatest) of an image, of aspect ratio 3/4 to 4/3 (Szegedy et al., 2014).

    After ten failed attempts, the largest centred window with a permitted ratio.
    """
    least, greatest = area
    for _ in range(10):
        share, log_ratio, down, along = rng.random(4).tolist()  # one call, because numpy's overhead is per call
        target = height * width * (least + share * (greatest - least))
        ratio = (4 / 3) ** (2 * log_ratio - 1)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(along * (width - w + 1))
            return slice(top, top + h), slice(left, left + w)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    top, left = (height - h) // 2, (width - w) // 2
    return slice(top, top + h), slice(left, left + w)


def distorted_bounding_box(height: int, width: int, area: tuple[float, float], rng: np.random.Generator) -> Window:
    """Rows and columns of `area` (least, greatest) of an image, as by TensorFlow's `sample_distorted_bounding_box`.

    The aspect ratio is uniform in 0.75 to 1.33, and the height uniform between those that the least and the greatest
    area allow, so that windows are smaller on average than those of `random_window`. They never touch the last row or
    column unless they are as large as the image. After a hundred failed attempts, the whole image.
    """
    least, greatest = (share * height * width for share in area)
    for _ in range(100):
        shape, tall, down, along = rng.random(4).tolist()
        ratio = 0.75 + 0.58 * shape
        highest = min(height, round(math.sqrt(greatest / ratio)))
        if round(highest * ratio) > width:
            highest = int((width + 0.5) / ratio)
            highest -= round(highest * ratio) > width
        lowest = min(highest, round(math.sqrt(least / ratio)))
        h = lowest + int(tall * (highest - lowest + 1))
        h += h * round(h * ratio) < least
        h -= h * round(h * ratio) > greatest
        w = round(h * ratio)
        if least <= h * w <= greatest and 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h)), int(along * (width - w))
            return slice(top, top + h), slice(left, left + w)
    return slice(0, height), slice(0, width)


@dataclass(frozen=True, slots=True)
class TrainTransform:
    """A training view of an image; draws only from the generator of the sample.

    `crop` "random" cuts out a `random_window` of `crop_area` of the image, "distorted_bounding_box" the window of that
    name, and "whole" resizes all of it. After resizing and flipping come `random_augment` and `color_jitter`. What
    `random_erasing` erases is drawn from a stream of its own and erased after normalization.
    """

    size: int
    crop: Literal["random", "distorted_bounding_box", "whole"] = "random"
    crop_area: tuple[float, float] = (0.05, 1.0)
    flip: bool = True
    random_augment: RandomAugment | None = None
    color_jitter: ColorJitter | None = None
    random_erasing: RandomErasing | None = None

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """(H, W, 3) -> (size, size, 3), both uint8."""
        rows, columns = self.window(pixels.shape[0], pixels.shape[1], rng)
        return self.view(pixels[rows, columns], rng)

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        """The crop of an image of this size, in pixels; drawn first."""
        if self.crop == "whole":
            return slice(0, height), slice(0, width)
        draw = random_window if self.crop == "random" else distorted_bounding_box
        return draw(height, width, self.crop_area, rng)

    def view(self, crop: Pixels, rng: np.random.Generator) -> Pixels:
        """What is done with the crop, (H, W, 3) -> (size, size, 3), both uint8; drawn with the same generator."""
        pixels = resize(crop, self.size)
        if self.flip and rng.random() < 0.5:
            pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)  # many times faster than copying a mirrored view
        if self.random_augment:
            pixels = self.random_augment(pixels, rng)
        return self.color_jitter(pixels, rng) if self.color_jitter else pixels


@dataclass(frozen=True, slots=True)
class EvaluationTransform:
    """The evaluation view: `crop` "center" (side S / (S + 32)) or "whole"."""

    size: int
    crop: Literal["center", "whole"] = "center"

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) -> (size, size, 3), both uint8."""
        return resize(center_crop(pixels, self.size) if self.crop == "center" else pixels, self.size)
