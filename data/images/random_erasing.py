"""Random erasing (Zhong et al., 2017) as in timm: rectangles of the normalized image are replaced."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ErasingMode = Literal["const", "rand", "pixel"]

_AREA = (0.02, 1 / 3)  # least and greatest share of the image, over all rectangles
_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))


@dataclass(frozen=True, slots=True)
class ErasedRectangle:
    """Rows and columns of an image, and what is put there after normalization: the mean color is 0."""

    rows: slice
    columns: slice
    values: NDArray[np.float32]
    """(h, w, 3), or (1, 1, 3) for a rectangle of one color."""


@dataclass(frozen=True, slots=True)
class RandomErasing:
    """Erases rectangles of an image with `probability`: between 1 and `max_count`, of 2 % to a third of it together.

    `mode` "const" fills a rectangle with the mean color, "rand" with one color, and "pixel" each pixel with another
    one, both drawn from the standard normal distribution of normalized values. The logarithm of the aspect ratio is
    uniform in 0.3 to 1 / 0.3. After ten attempts that do not fit into the image, a rectangle is left out.
    """

    probability: float
    mode: ErasingMode = "pixel"
    max_count: int = 1

    def rectangles(self, size: int, rng: np.random.Generator) -> list[ErasedRectangle]:
        """The rectangles of one square image of `size` pixels; later ones lie over earlier ones."""
        if rng.random() > self.probability:
            return []
        count = int(rng.integers(1, self.max_count, endpoint=True)) if self.max_count > 1 else 1
        return [found for _ in range(count) if (found := self._rectangle(size, count, rng))]

    def _rectangle(self, size: int, count: int, rng: np.random.Generator) -> ErasedRectangle | None:
        for _ in range(10):
            area = rng.uniform(*_AREA) * size * size / count
            ratio = math.exp(rng.uniform(*_LOG_RATIO))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < size and width < size:
                top = int(rng.integers(size - height, endpoint=True))
                left = int(rng.integers(size - width, endpoint=True))
                rows, columns = slice(top, top + height), slice(left, left + width)
                return ErasedRectangle(rows, columns, self._values(height, width, rng))
        return None

    def _values(self, height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
        match self.mode:
            case "const":
                return np.zeros((1, 1, 3), np.float32)
            case "rand":
                return rng.standard_normal((1, 1, 3), np.float32)
            case "pixel":
                return rng.standard_normal((height, width, 3), np.float32)
