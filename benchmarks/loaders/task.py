"""What every loader has to deliver: batches of random crops of the same JPEGs."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.pillow_transform import pillow_random_augment, pillow_transform
from data.images.augment import random_window
from data.images.decode import Pixels

SIZE = 224
BATCH = 64
SAMPLES_PER_SHARD = 200
LAYERS, MAGNITUDE = 2, 15.0
AREA = (0.05, 1.0)

Images = Iterator[Any]
"""The images of batches without an end: tensors or arrays of (64, 224, 224, 3) uint8."""
Batches = Callable[[Path, int, bool], Images]
"""(folder, workers, whether RandAugment is applied) -> images. The folder has `images` and `shards`."""


def with_pillow(encoded: bytes, augmented: bool) -> torch.Tensor:
    """A crop of (224, 224, 3) uint8 as it is usually made."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    augment = (LAYERS, MAGNITUDE) if augmented else None
    return torch.from_numpy(np.array(pillow_transform(image, SIZE, augment, np.random.default_rng())))


def with_opencv(encoded: bytes, augmented: bool) -> torch.Tensor:
    """The same with OpenCV, which has no RandAugment: that is Pillow's."""
    rng = np.random.default_rng()
    pixels = np.asarray(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB), np.uint8)
    height, width = pixels.shape[:2]
    rows, columns = random_window(height, width, AREA, rng)
    # Area averaging, since OpenCV's bilinear filter is not antialiased.
    pixels = np.asarray(cv2.resize(pixels[rows, columns], (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8)
    if rng.random() < 0.5:
        pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)
    return torch.from_numpy(augmented_with_pillow(pixels) if augmented else pixels)


def augmented_with_pillow(pixels: Pixels) -> Pixels:
    """RandAugment of Pillow for (224, 224, 3) uint8."""
    image = Image.fromarray(pixels)
    return np.array(pillow_random_augment(image, LAYERS, MAGNITUDE, np.random.default_rng()))
