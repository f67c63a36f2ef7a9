"""The training transform as it is usually written, with Pillow: the reference of ours in benchmarks and tests."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data.images.augment import random_window

PillowImage = Image.Image
_GREY = (128, 128, 128)


def pillow_transform(
    image: PillowImage, size: int, augment: tuple[int, float] | None, rng: np.random.Generator
) -> PillowImage:
    """Random resized crop, flip, and RandAugment of (layers, magnitude): RGB in, (size, size) RGB out."""
    rows, columns = random_window(image.height, image.width, (0.05, 1.0), rng)
    box = (columns.start, rows.start, columns.stop, rows.stop)
    image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pillow_random_augment(image, *augment, rng) if augment else image


def pillow_random_augment(image: PillowImage, layers: int, magnitude: float, rng: np.random.Generator) -> PillowImage:
    """RandAugment of RGB images of 224 pixels and more."""
    for number in rng.integers(len(_OPERATIONS), size=layers):
        image = _OPERATIONS[number](image, magnitude / 10, rng)
    return image


def _either_way(amount: float, rng: np.random.Generator) -> float:
    return amount if rng.random() < 0.5 else -amount


def _affine(image: PillowImage, *matrix: float) -> PillowImage:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=_GREY)


def _cutout(image: PillowImage, reach: int, rng: np.random.Generator) -> PillowImage:
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(_GREY, (x - reach, y - reach, x + reach, y + reach))
    return image


def _factor(strength: float) -> float:
    return 1.8 * strength + 0.1


OPERATIONS: Mapping[str, Callable[[PillowImage, float, np.random.Generator], PillowImage]] = {
    "auto_contrast": lambda p, s, rng: ImageOps.autocontrast(p),
    "equalize": lambda p, s, rng: ImageOps.equalize(p),
    "invert": lambda p, s, rng: ImageOps.invert(p),
    "rotate": lambda p, s, rng: p.rotate(_either_way(30 * s, rng), Image.Resampling.NEAREST, fillcolor=_GREY),
    "posterize": lambda p, s, rng: ImageOps.posterize(p, min(8, max(1, int(4 * s)))),
    "solarize": lambda p, s, rng: ImageOps.solarize(p, int(256 * s)),
    "solarize_add": lambda p, s, rng: p.point([v + int(110 * s) if v < 128 else v for v in range(256)] * 3),
    "color": lambda p, s, rng: ImageEnhance.Color(p).enhance(_factor(s)),
    "contrast": lambda p, s, rng: ImageEnhance.Contrast(p).enhance(_factor(s)),
    "brightness": lambda p, s, rng: ImageEnhance.Brightness(p).enhance(_factor(s)),
    "sharpness": lambda p, s, rng: ImageEnhance.Sharpness(p).enhance(_factor(s)),
    "shear_x": lambda p, s, rng: _affine(p, 1, _either_way(0.3 * s, rng), 0, 0, 1, 0),
    "shear_y": lambda p, s, rng: _affine(p, 1, 0, 0, _either_way(0.3 * s, rng), 1, 0),
    "translate_x": lambda p, s, rng: _affine(p, 1, 0, _either_way(int(100 * s), rng), 0, 1, 0),
    "translate_y": lambda p, s, rng: _affine(p, 1, 0, 0, 0, 1, _either_way(int(100 * s), rng)),
    "cutout": lambda p, s, rng: _cutout(p, int(40 * s), rng),
}
"""For images of 224 pixels and more, for which the lengths in pixels are meant."""
_OPERATIONS = tuple(OPERATIONS.values())
