"""RandAugment (Cubuk et al., 2019) with the magnitudes of the EfficientNet code, to which the CoAtNet paper refers.

The strength is the magnitude divided by 10, so that the paper's 15 rotates by 45 degrees. (In torchvision's RandAugment
the same number means something weaker.) Each operation equals Pillow's to the level, apart from ties where noted.
OpenCV computes them on arrays in less than half the time and releases the interpreter lock.

The EfficientNet code reimplements Pillow's operations in TensorFlow. Ten are equal and four within rounding, but its
contrast and its solarize do something else; both kinds can be chosen.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from data.images.decode import Pixels

GREY = 128
"""Fills areas that an operation uncovers."""

# Pillow's weights of red, green and blue in grey (ITU-R 601).
_LUMA = np.array([[19595, 38470, 7471]], np.float64) / 65536
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_LEVELS = np.arange(256)


@dataclass(frozen=True, slots=True)
class RandomAugment:
    """`layers` consecutive operations, each drawn from sixteen and always applied, with `magnitude`.

    `operations` "pillow" draws from `OPERATIONS`, "efficientnet" from `EFFICIENTNET_OPERATIONS`.
    """

    layers: int
    magnitude: float
    operations: Literal["pillow", "efficientnet"] = "pillow"

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """(H, W, 3) -> the same shape, both uint8."""
        operations = _OPERATIONS if self.operations == "pillow" else _EFFICIENTNET_OPERATIONS
        for number in rng.integers(len(operations), size=self.layers):
            pixels = operations[number](pixels, self.magnitude / 10, rng)
        return pixels


def auto_contrast(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Stretch each channel to 0 .. 255."""
    # Over rows first: numpy has fast code only for that.
    lows = pixels.min(axis=0).min(axis=0).astype(np.float64)
    highs = pixels.max(axis=0).max(axis=0).astype(np.float64)
    scales = 255 / np.maximum(1, highs - lows)
    stretched = _LEVELS[:, None] * scales - lows * scales
    return _look_up(pixels, np.where(lows < highs, stretched, _LEVELS[:, None]))


def equalize(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Spread the levels of each channel so that they are about equally frequent."""
    tables = []
    for channel in _histograms(pixels):
        step = (channel.sum() - channel[np.nonzero(channel)[0][-1]]) // 255
        below = np.cumsum(channel) - channel
        tables.append((step // 2 + below) // step if step else _LEVELS)
    return _look_up(pixels, np.stack(tables, axis=1))


def invert(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """The negative."""
    return 255 - pixels


def rotate(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Turn by 30 degrees times strength about the centre, either way."""
    height, width = pixels.shape[:2]
    angle = _either_way(math.radians(30 * strength), rng)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return _warped(pixels, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def posterize(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Keep the upper 4 times strength bits of 8, but at least one: none would leave black."""
    bits = min(8, max(1, int(4 * strength)))
    return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Invert levels of at least 256 times strength: none beyond magnitude 10."""
    return _look_up(pixels, np.where(int(256 * strength) > _LEVELS, _LEVELS, 255 - _LEVELS))


def wrapping_solarize(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Invert levels of at least 256 times strength modulo 256: TensorFlow compares with a threshold of 8 bits."""
    return _look_up(pixels, np.where(int(256 * strength) % 256 > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Add 110 times strength to levels below 128."""
    return _look_up(pixels, np.where(_LEVELS < 128, _LEVELS + int(110 * strength), _LEVELS))


def color(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Saturation times 1.8 times strength + 0.1."""
    grey = cv2.cvtColor(cv2.transform(pixels, _LUMA), cv2.COLOR_GRAY2RGB)
    return _blended(np.asarray(grey, np.uint8), pixels, strength)


def contrast(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Distances from the mean grey times 1.8 times strength + 0.1."""
    mean = int(cv2.mean(cv2.transform(pixels, _LUMA))[0] + 0.5)
    return _look_up(pixels, mean + _factor(strength) * (_LEVELS - mean).astype(np.float32))


def size_contrast(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Distances from level H W / 256, at most 255, times 1.8 times strength + 0.1.

    The code divides the sum of a histogram of 256 bins, which is the number of pixels, by 256, and calls it the mean.
    """
    height, width = pixels.shape[:2]
    level = min(255, height * width // 256)
    return _look_up(pixels, level + _factor(strength) * (_LEVELS - level).astype(np.float32))


def brightness(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Levels times 1.8 times strength + 0.1."""
    return _look_up(pixels, _factor(strength) * _LEVELS.astype(np.float32))


def sharpness(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Distances from the smoothed image times 1.8 times strength + 0.1; the outermost pixels stay."""
    smooth = np.asarray(cv2.filter2D(pixels, -1, _SMOOTH), np.uint8)
    smooth[[0, -1]] = pixels[[0, -1]]
    smooth[:, [0, -1]] = pixels[:, [0, -1]]
    return _blended(smooth, pixels, strength)


def shear_x(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Shift each row by 0.3 times strength of its distance from the top, either way."""
    return _warped(pixels, [[1, _either_way(0.3 * strength, rng), 0], [0, 1, 0]])


def shear_y(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Shift each column by 0.3 times strength of its distance from the left, either way."""
    return _warped(pixels, [[1, 0, 0], [_either_way(0.3 * strength, rng), 1, 0]])


def translate_x(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Shift sideways by 100 pixels times strength, either way."""
    to, source = _shift(pixels.shape[1], _either_way(_pixels(100, strength, pixels), rng))
    shifted = np.full_like(pixels, GREY)
    shifted[:, to] = pixels[:, source]
    return shifted


def translate_y(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Shift up or down by 100 pixels times strength."""
    to, source = _shift(pixels.shape[0], _either_way(_pixels(100, strength, pixels), rng))
    shifted = np.full_like(pixels, GREY)
    shifted[to] = pixels[source]
    return shifted


def cutout(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Grey out a square, cropped at the edges, of 40 pixels times strength in each direction from a random centre."""
    height, width = pixels.shape[:2]
    x, y, reach = int(rng.integers(width)), int(rng.integers(height)), _pixels(40, strength, pixels)
    pixels = pixels.copy()
    pixels[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = GREY
    return pixels


OPERATIONS: Mapping[str, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    operation.__name__: operation
    for operation in (
        auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color,
        contrast, brightness, sharpness, shear_x, shear_y, translate_x, translate_y, cutout,
    )
}  # fmt: skip
"""By name: (H, W, 3) uint8, strength, generator of the sample -> (H, W, 3) uint8; the input is not modified."""
EFFICIENTNET_OPERATIONS: Mapping[str, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    **OPERATIONS,
    "solarize": wrapping_solarize,
    "contrast": size_contrast,
}
"""The same with the two that the EfficientNet code computes in another way."""
_OPERATIONS = tuple(OPERATIONS.values())
_EFFICIENTNET_OPERATIONS = tuple(EFFICIENTNET_OPERATIONS.values())


def _either_way(amount: float, rng: np.random.Generator) -> float:
    return amount if rng.random() < 0.5 else -amount


def _pixels(at_224: int, strength: float, pixels: Pixels) -> int:
    """A length that the paper's code states in pixels. Our addition: it shrinks for images below 224."""
    return int(at_224 * strength * min(1.0, min(pixels.shape[:2]) / 224))


def _shift(length: int, by: float) -> tuple[slice, slice]:
    """Target and source ranges of an axis whose pixels are read at an offset of `by`."""
    by = max(-length, min(length, int(by)))
    return slice(max(0, -by), length - max(0, by)), slice(max(0, by), length - max(0, -by))


def _factor(strength: float) -> np.float32:
    return np.float32(1.8 * strength + 0.1)


def _blended(degenerate: Pixels, pixels: Pixels, strength: float) -> Pixels:
    """degenerate + factor * (pixels - degenerate), clipped.

    Pillow rounds down, OpenCV to the nearest. For integer magnitudes the factors are multiples of 0.02, for which
    subtracting 0.49 rounds down; for others the result may be one level higher.
    """
    factor = float(_factor(strength))
    return np.asarray(cv2.addWeighted(pixels, factor, degenerate, 1 - factor, -0.49), np.uint8)


def _histograms(pixels: Pixels) -> list[NDArray[np.int64]]:
    """How often each level (256,) occurs, by channel."""
    return [cv2.calcHist([pixels], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(3)]


def _look_up(pixels: Pixels, table: NDArray[np.integer | np.floating]) -> Pixels:
    """Each level replaced by its entry in `table` (256,) or, by channel, (256, 3); entries are clipped to 0 .. 255."""
    entries = np.clip(table, 0, 255).astype(np.uint8).reshape(1, 256, -1)
    return np.asarray(cv2.LUT(pixels, entries), np.uint8)


def _warped(pixels: Pixels, matrix: list[list[float]]) -> Pixels:
    """The pixel at (x, y) taken from the one nearest to `matrix` (2, 3) times (x, y, 1), as in the EfficientNet code.

    Coordinates start at the corner of the image, OpenCV's at the centre of the first pixel. Of two equally near pixels,
    Pillow may take the other one.
    """
    places = np.array(matrix, np.float64)
    places[:, 2] += places[:, :2].sum(axis=1) / 2 - 0.5
    height, width = pixels.shape[:2]
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    # A fourth channel makes it more than twice as fast: whole pixels are moved at once.
    padded = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    warped = cv2.warpAffine(padded, places, (width, height), flags=flags, borderValue=(GREY, GREY, GREY, GREY))
    return np.asarray(cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB), np.uint8)
