"""Crop, resize and flip."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data.images.augment import TrainTransform, center_crop, distorted_bounding_box, random_window, resize


def test_random_windows_stay_inside_and_cover_the_range() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        rows, columns = random_window(40, 60, (0.2, 0.6), rng)
        assert 0 <= rows.start < rows.stop <= 40
        assert 0 <= columns.start < columns.stop <= 60
        shares.append((rows.stop - rows.start) * (columns.stop - columns.start) / 2400)
    assert 0.15 < min(shares) < 0.25
    assert 0.55 < max(shares) < 0.65


def test_an_image_too_narrow_for_a_window_gives_the_largest_centred_one() -> None:
    assert random_window(10, 400, (0.9, 1.0), np.random.default_rng(0)) == (slice(0, 10), slice(193, 206))


def code_crop(
    width: int, height: int, area: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width as by one attempt of TensorFlow's `GenerateRandomCrop`, from four uniform numbers."""
    shape, tall, down, along = rng.random(4)
    ratio = 0.75 + (1.33 - 0.75) * shape
    least, greatest = area[0] * width * height, area[1] * width * height
    h, max_h = round(math.sqrt(least / ratio)), round(math.sqrt(greatest / ratio))
    if round(max_h * ratio) > width:
        max_h = int((width + 0.5 - 1e-7) / ratio)
        if round(max_h * ratio) > width:
            max_h -= 1
    max_h = min(max_h, height)
    h = min(h, max_h)
    if h < max_h:
        h += int(tall * (max_h - h + 1))
    w = round(h * ratio)
    if h * w < least:
        h, w = h + 1, round((h + 1) * ratio)
    if h * w > greatest:
        h, w = h - 1, round((h - 1) * ratio)
    if not least <= h * w <= greatest or not 0 < w <= width or not 0 < h <= height:
        return None
    top = int(down * (height - h)) if h < height else 0
    left = int(along * (width - w)) if w < width else 0
    return top, left, h, w


@pytest.mark.parametrize("area", [(0.05, 1.0), (0.5, 0.6)])
@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (40, 640), (3, 7)])
def test_distorted_bounding_boxes_are_those_of_tensorflows_formulas(
    size: tuple[int, int], area: tuple[float, float]
) -> None:
    height, width = size
    for seed in range(300):
        rows, columns = distorted_bounding_box(height, width, area, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        theirs = next(filter(None, (code_crop(width, height, area, rng) for _ in range(100))), (0, 0, height, width))
        assert (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start) == theirs


def test_distorted_bounding_boxes_cut_deeper_than_windows_whose_area_is_uniform() -> None:
    def mean_share(window: Callable[..., tuple[slice, slice]]) -> float:
        rng, total = np.random.default_rng(0), 0
        for _ in range(4000):
            rows, columns = window(375, 500, (0.05, 1.0), rng)
            total += (rows.stop - rows.start) * (columns.stop - columns.start)
        return total / 4000 / (375 * 500)

    assert round(mean_share(distorted_bounding_box), 2) == 0.34
    assert round(mean_share(random_window), 2) == 0.42


def test_the_chosen_crop_is_taken() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    rows, columns = distorted_bounding_box(40, 60, (0.05, 1.0), np.random.default_rng(5))
    view = TrainTransform(16, crop="distorted_bounding_box", flip=False)(pixels, np.random.default_rng(5))
    assert np.array_equal(view, resize(pixels[rows, columns], 16))


def test_centre_crop_is_s_over_s_plus_32() -> None:
    image = np.arange(256 * 300 * 3, dtype=np.uint32).reshape(256, 300, 3).astype(np.uint8)
    crop = center_crop(image, 224)
    assert np.array_equal(crop, image[16:240, 38:262])


@pytest.mark.parametrize("size", [(400, 470), (224, 900), (90, 70), (300, 100), (1500, 1200)])
def test_resizing_equals_pillow_within_one_level(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR))
    assert np.abs(resize(pixels, 224).astype(int) - theirs).max() <= 1


def test_an_image_of_the_target_size_is_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(resize(pixels, 32), pixels)


def test_half_of_the_training_views_are_mirrored() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    transform = TrainTransform(16, crop="whole")
    mirrored = [np.array_equal(transform(pixels, np.random.default_rng(n)), pixels[:, ::-1]) for n in range(200)]
    assert 70 < sum(mirrored) < 130
