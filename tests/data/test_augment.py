"""Crop, resize and flip."""

import numpy as np
import pytest
from PIL import Image

from data.augment import TrainTransform, center_crop, random_window, resize


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
