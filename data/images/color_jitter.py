"""Random brightness, contrast, saturation and hue, as by torchvision's ColorJitter on a Pillow image, to the level."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.images.decode import Pixels

# Pillow's weights of red, green and blue in grey (ITU-R 601), in 1 / 65536.
_RED, _GREEN, _BLUE = 19595, 38470, 7471
_LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class ColorJitter:
    """Four changes in random order, each by a random amount.

    Brightness, contrast and saturation are multiplied by a factor that is uniform in max(0, 1 - amount) to 1 + amount,
    and the hue is turned by a share of the circle that is uniform in -hue to hue, at most half of it. An amount of 0
    leaves a change out.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """(H, W, 3) -> the same shape, both uint8; the input is not modified."""
        order = rng.permutation(4)
        draws = rng.random(4)  # always four, so that none depends on what is left out
        for number in order.tolist():
            amount = (self.brightness, self.contrast, self.saturation, self.hue)[number]
            if not amount:
                continue
            if number == 3:
                pixels = turned_hue(pixels, float(amount * (2 * draws[3] - 1)))
            else:
                least = max(0.0, 1 - amount)
                factor = float(least + draws[number] * (1 + amount - least))
                pixels = (brightened, contrasted, saturated)[number](pixels, factor)
        return pixels


def brightened(pixels: Pixels, factor: float) -> Pixels:
    """Levels times `factor`."""
    return _blended(np.float32(0), _LEVELS, factor)[pixels]


def contrasted(pixels: Pixels, factor: float) -> Pixels:
    """Distances from the mean grey times `factor`."""
    mean = int(_grey(pixels).mean() + 0.5)
    return _blended(np.float32(mean), _LEVELS, factor)[pixels]


def saturated(pixels: Pixels, factor: float) -> Pixels:
    """Distances from each pixel's grey times `factor`."""
    return _blended(_grey(pixels).astype(np.float32)[:, :, None], pixels.astype(np.float32), factor)


def turned_hue(pixels: Pixels, share: float) -> Pixels:
    """The hue turned by a `share` of the circle, in steps of 1 / 256."""
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    hsv[:, :, 0] += np.uint8(int(share * 255) % 256)  # modulo 256
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def _grey(pixels: Pixels) -> NDArray[np.uint32]:
    """(H, W) of (H, W, 3), rounded as Pillow does."""
    red, green, blue = (pixels[:, :, channel].astype(np.uint32) for channel in range(3))
    grey: NDArray[np.uint32] = (red * _RED + green * _GREEN + blue * _BLUE + 0x8000) // 65536
    return grey


def _blended(degenerate: NDArray[np.float32] | np.float32, levels: NDArray[np.float32], factor: float) -> Pixels:
    """degenerate + factor * (levels - degenerate), clipped and rounded down in float32, as Pillow does."""
    return np.clip(degenerate + np.float32(factor) * (levels - degenerate), 0, 255).astype(np.uint8)
