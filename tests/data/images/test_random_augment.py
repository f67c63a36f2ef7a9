"""RandAugment: each operation compared with Pillow's, and how operations are drawn."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from benchmarks.pillow_transform import OPERATIONS as PILLOW
from data.images.decode import Pixels
from data.images.random_augment import EFFICIENTNET_OPERATIONS, OPERATIONS, RandomAugment

Picture = Image.Image
GREY = (128, 128, 128)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft shapes with texture, noise and a cast of colour; no channel reaches 0 and 255, as is usual."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 190, (7, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 12, (height, width, 3))
    return np.clip(np.asarray(coarse) * [1.0, 0.9, 0.7] + noise + 20, 3, 251).astype(np.uint8)


def affine(picture: Picture, *matrix: float) -> Picture:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


def either_way(amount: float, rng: np.random.Generator) -> float:
    return amount if rng.random() < 0.5 else -amount


def rotated(picture: Picture, degrees: float, dx: float, dy: float) -> Picture:
    return picture.rotate(degrees, Image.Resampling.NEAREST, translate=(dx, dy), fillcolor=GREY)  # type: ignore[arg-type]


# These look between pixels; (dx, dy) moves where.
WARPS: dict[str, Callable[[Picture, float, np.random.Generator, float, float], Picture]] = {
    "rotate": lambda p, m, rng, dx, dy: rotated(p, either_way(m / 10 * 30, rng), dx, dy),
    "shear_x": lambda p, m, rng, dx, dy: affine(p, 1, either_way(m / 10 * 0.3, rng), dx, 0, 1, dy),
    "shear_y": lambda p, m, rng, dx, dy: affine(p, 1, 0, dx, either_way(m / 10 * 0.3, rng), 1, dy),
}


def test_the_operations_are_the_sixteen_of_the_efficientnet_code() -> None:
    assert list(OPERATIONS) == list(PILLOW)
    assert len(OPERATIONS) == 16


@pytest.mark.parametrize("magnitude", [0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in WARPS])
def test_each_operation_equals_pillows_to_the_level(name: str, magnitude: float) -> None:
    for seed in range(4):
        pixels = photograph(224, 224 + 32 * (seed % 2), seed)
        before = pixels.copy()
        ours = OPERATIONS[name](pixels, magnitude / 10, np.random.default_rng(seed))
        theirs = PILLOW[name](Image.fromarray(pixels), magnitude / 10, np.random.default_rng(seed))
        assert np.array_equal(ours, np.asarray(theirs))
        assert np.array_equal(pixels, before)


@pytest.mark.parametrize("magnitude", [0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0])
@pytest.mark.parametrize("name", WARPS)
def test_each_warp_equals_pillows_except_where_two_pixels_are_equally_near(name: str, magnitude: float) -> None:
    # Then each takes another one. Pillow's result at an offset of 1/256 pixel shows which pixels these are.
    for seed in range(4):
        pixels = photograph(224, 224 + 32 * (seed % 2), seed)
        ours = OPERATIONS[name](pixels, magnitude / 10, np.random.default_rng(seed))
        equal = np.zeros(ours.shape[:2], bool)
        for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            picture = WARPS[name](Image.fromarray(pixels), magnitude, np.random.default_rng(seed), dx / 256, dy / 256)
            equal |= (ours == np.asarray(picture)).all(axis=2)
        assert equal.all()


@pytest.mark.parametrize("magnitude", [0.3, 4.44, 12.345])
@pytest.mark.parametrize("name", ["color", "sharpness"])
def test_for_fractional_magnitudes_blends_are_at_most_one_level_off(name: str, magnitude: float) -> None:
    pixels = photograph(224, 224)
    ours = OPERATIONS[name](pixels, magnitude / 10, np.random.default_rng(0))
    theirs = np.asarray(PILLOW[name](Image.fromarray(pixels), magnitude / 10, np.random.default_rng(0)))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_images_of_one_colour_and_of_one_pixel_are_accepted(name: str) -> None:
    for pixels in (np.full((32, 32, 3), 77, np.uint8), np.zeros((1, 1, 3), np.uint8)):
        out = OPERATIONS[name](pixels, 1.5, np.random.default_rng(0))
        assert (out.shape, out.dtype) == (pixels.shape, np.dtype(np.uint8))
    if name in ("auto_contrast", "equalize", "sharpness"):
        assert np.array_equal(out, pixels)


@pytest.mark.parametrize(("size", "shift", "side"), [(112, 75, 60), (224, 150, 120), (448, 150, 120)])
def test_lengths_in_pixels_shrink_only_for_images_below_224(size: int, shift: int, side: int) -> None:
    white = np.full((size, size, 3), 255, np.uint8)
    moved = OPERATIONS["translate_x"](white, 1.5, np.random.default_rng(0))
    assert (moved[0, :, 0] == 128).sum() == shift
    squares = [(OPERATIONS["cutout"](white, 1.5, np.random.default_rng(n)) == 128).sum() for n in range(50)]
    assert max(squares) == 3 * side * side


def code_blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """`blend` of the EfficientNet code: float32, clipped where it extrapolates, then cut off."""
    if factor in (0.0, 1.0):
        return degenerate if factor == 0.0 else image
    low, high = degenerate.astype(np.float32), image.astype(np.float32)
    mixed = low + np.float32(factor) * (high - low)
    return (mixed if 0 < factor < 1 else np.clip(mixed, 0, 255)).astype(np.uint8)


def code_contrast(image: np.ndarray, magnitude: float) -> np.ndarray:
    """`contrast` of the EfficientNet code, whose mean is that of a histogram's counts."""
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(np.int32)
    counts = np.histogram(grey, bins=256, range=(0, 255))[0]
    mean = np.float32(counts.sum()) / np.float32(256)
    degenerate = np.clip(np.ones(image.shape, np.float32) * mean, 0, 255).astype(np.uint8)
    return code_blend(degenerate, image, (magnitude / 10.0) * 1.8 + 0.1)


def code_solarize(image: np.ndarray, magnitude: float) -> np.ndarray:
    """`solarize` of the EfficientNet code: TensorFlow makes a uint8 of the threshold, as a cast in C does."""
    threshold = np.array(int((magnitude / 10.0) * 256)).astype(np.uint8)
    return np.where(image < threshold, image, 255 - image)


CODE = {"contrast": code_contrast, "solarize": code_solarize}


@pytest.mark.parametrize("magnitude", [0.0, 2.0, 5.0, 9.0, 10.0, 15.0, 20.0, 30.0])
@pytest.mark.parametrize("name", CODE)
def test_contrast_and_solarize_of_the_efficientnet_code_are_those_of_its_formulas(name: str, magnitude: float) -> None:
    for height, width in ((96, 64), (224, 224), (256, 256), (300, 384)):
        pixels = photograph(height, width)
        ours = EFFICIENTNET_OPERATIONS[name](pixels, magnitude / 10, np.random.default_rng(0))
        assert np.array_equal(ours, CODE[name](pixels, magnitude))


def test_the_other_operations_of_the_efficientnet_code_are_those_of_pillow() -> None:
    assert list(EFFICIENTNET_OPERATIONS) == list(OPERATIONS)
    differing = {name for name, operation in OPERATIONS.items() if EFFICIENTNET_OPERATIONS[name] is not operation}
    assert differing == CODE.keys()


def test_the_chosen_operations_are_applied_to_the_same_draws() -> None:
    ours, theirs = RandomAugment(2, 15.0), RandomAugment(2, 15.0, "efficientnet")
    pixels, differing = photograph(64, 64), set()
    for seed in range(64):
        drawn = {list(OPERATIONS)[n] for n in np.random.default_rng(seed).integers(16, size=2)}
        one, other = (augment(pixels, np.random.default_rng(seed)) for augment in (ours, theirs))
        if not np.array_equal(one, other):
            differing |= drawn
            assert drawn & CODE.keys()
    assert CODE.keys() <= differing


def test_each_layer_draws_uniformly_from_all_operations_and_always_applies_one(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []

    def recorder(name: str) -> Callable[[Pixels, float, np.random.Generator], Pixels]:
        def record(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
            applied.append(f"{name} {strength}")
            return pixels

        return record

    monkeypatch.setattr("data.images.random_augment._OPERATIONS", tuple(map(recorder, OPERATIONS)))
    for seed in range(1600):
        RandomAugment(2, 15.0)(np.zeros((4, 4, 3), np.uint8), np.random.default_rng(seed))
    assert len(applied) == 3200
    counts = Counter(applied)
    assert set(counts) == {f"{name} 1.5" for name in OPERATIONS}
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in counts.values())


def test_pixels_depend_only_on_the_generator() -> None:
    pixels = photograph(64, 64)
    augment = RandomAugment(3, 9.0)
    first, again, other = (augment(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
