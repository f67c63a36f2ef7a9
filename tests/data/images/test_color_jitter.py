"""Color jitter: each change is torchvision's on a Pillow image, to the level; the draws."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data.images.color_jitter import ColorJitter, brightened, contrasted, saturated, turned_hue
from data.images.decode import Pixels
from tests.support.timm_import import timm

TorchvisionColorJitter = timm.data.transforms_factory.transforms.ColorJitter

RANDOM = np.random.default_rng(0)
SMOOTH = np.stack(np.meshgrid(np.arange(64), np.arange(40) * 6, indexing="xy"), axis=2).astype(np.uint8)
IMAGES = [
    RANDOM.integers(0, 256, (40, 64, 3), dtype=np.uint8),
    np.dstack([SMOOTH, 255 - SMOOTH[:, :, 0]]).astype(np.uint8),
    np.full((5, 7, 3), 200, np.uint8),
]


def theirs(pixels: Pixels, order: list[int], factors: list[float | None], monkeypatch: pytest.MonkeyPatch) -> Pixels:
    """torchvision's result if it draws these: brightness, contrast, saturation, hue."""
    monkeypatch.setattr(TorchvisionColorJitter, "get_params", lambda *ranges: (order, *factors))
    return np.array(TorchvisionColorJitter(0.4, 0.4, 0.4, 0.1)(Image.fromarray(pixels)))


@pytest.mark.parametrize("pixels", IMAGES, ids=["noise", "smooth", "plain"])
@pytest.mark.parametrize(
    ("number", "ours"), list(enumerate((brightened, contrasted, saturated, turned_hue))), ids=["brightness", "contrast", "saturation", "hue"]
)  # fmt: skip
def test_each_change_equals_torchvisions(
    monkeypatch: pytest.MonkeyPatch, number: int, ours: Callable[[Pixels, float], Pixels], pixels: Pixels
) -> None:
    for amount in [*np.random.default_rng(number).uniform(-0.5, 0.5, 40).tolist(), -0.5, 0.0, 0.5]:
        factor = amount if number == 3 else 1 + 1.9 * amount
        factors: list[float | None] = [None] * 4
        factors[number] = factor
        assert np.array_equal(ours(pixels, factor), theirs(pixels, [number], factors, monkeypatch))


def test_all_together_equal_torchvisions_in_the_order_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    jitter = ColorJitter(0.4, 0.3, 1.2, 0.1)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        order, draws = rng.permutation(4).tolist(), rng.random(4)
        ranges = [(0.6, 1.4), (0.7, 1.3), (0.0, 2.2), (-0.1, 0.1)]  # the least factor is 0
        factors = [low + draw * (high - low) for (low, high), draw in zip(ranges, draws.tolist(), strict=True)]
        ours = jitter(IMAGES[0], np.random.default_rng(seed))
        assert np.array_equal(ours, theirs(IMAGES[0], order, factors, monkeypatch))


def test_amounts_of_zero_change_nothing_and_the_input_is_left_as_it_is() -> None:
    before = IMAGES[0].copy()
    assert np.array_equal(ColorJitter()(IMAGES[0], np.random.default_rng(0)), before)
    assert not np.array_equal(ColorJitter(hue=0.5)(IMAGES[0], np.random.default_rng(0)), before)
    assert np.array_equal(IMAGES[0], before)
