"""Random brightness, contrast, saturation and hue, as by torchvision's ColorJitter on a Pillow image, to the level."""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from data.images.decode import Pixels


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
    return _spread(pixels, 0, factor)


def contrasted(pixels: Pixels, factor: float) -> Pixels:
    """Distances from the mean grey times `factor`."""
    return _spread(pixels, int(np.asarray(Image.fromarray(pixels).convert("L")).mean() + 0.5), factor)


def saturated(pixels: Pixels, factor: float) -> Pixels:
    """Distances from each pixel's grey times `factor`."""
    image = Image.fromarray(pixels)
    return np.array(Image.blend(image.convert("L").convert("RGB"), image, factor))


def turned_hue(pixels: Pixels, share: float) -> Pixels:
    """The hue turned by a `share` of the circle, in steps of 1 / 256."""
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    hsv[:, :, 0] += np.uint8(int(share * 255) % 256)  # modulo 256
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def _spread(pixels: Pixels, level: int, factor: float) -> Pixels:
    """Distances from `level` times `factor`, clipped and rounded down in float32, as Pillow does.

    By a table, because Pillow computes every pixel.
    """
    levels = np.arange(256, dtype=np.float32)
    table = np.clip(level + np.float32(factor) * (levels - level), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels, table), np.uint8)
