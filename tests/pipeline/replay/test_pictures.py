"""The picture of the samples of a step with the highest and the lowest losses."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from data.images.contact_sheet import sheet_size
from pipeline.replay.pictures import SeenSample, sample_sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def sample(color: tuple[int, int, int], predicted: str = "dark", size: int = 32, loss: float = 1.5) -> SeenSample:
    return SeenSample("train/0001", "dark", predicted, 0.75, loss, np.full((size, size, 3), color, np.uint8))


def place(sheet: NDArray[np.uint8], color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has a color."""
    rows, columns = np.nonzero((sheet == color).all(axis=2))
    return int(rows.min()), int(columns.min()), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_small_images_are_enlarged_and_large_ones_shrunk_below_their_headings() -> None:
    sheet = sample_sheet({"highest loss": [sample(RED)] * 7, "lowest loss": [sample(BLUE, size=224)]})
    assert sheet.dtype == np.uint8
    width, height = sheet_size(6, 2, 176, lines=4)
    below = sheet_size(1, 1, 176, lines=4)[1]
    assert sheet.shape == (30 + height + 30 + below, width, 3)
    assert place(sheet[:220, :190], RED) == (30 + 16, 16, 160, 160), "five times as large, in the middle of its cell"
    assert place(sheet, BLUE) == (30 + height + 30 + 8, 8, 176, 176)
    for top in (0, 30 + height):
        assert (sheet[top : top + 30, :200] < 128).any(), "a heading"


def test_a_prediction_that_is_not_the_label_is_red() -> None:
    def colors(predicted: str) -> tuple[bool, bool]:
        sheet = sample_sheet({"highest loss": [sample((128, 128, 128), predicted)]}).astype(int)
        red, green = sheet[..., 0], sheet[..., 1]
        return bool((red > green + 40).any()), bool((green > red + 40).any())

    assert colors("bright") == (True, False)
    assert colors("dark") == (False, True)


def test_a_loss_that_is_not_finite_is_shown() -> None:
    infinite, nan = (sample_sheet({"highest loss": [sample(RED, loss=loss)]}) for loss in (math.inf, math.nan))
    assert not np.array_equal(infinite, nan)


def test_a_heading_without_samples_is_left_out() -> None:
    one = sample_sheet({"highest loss": [sample(RED)]})
    assert np.array_equal(sample_sheet({"highest loss": [sample(RED)], "lowest loss": []}), one)
    with pytest.raises(ValueError, match="no samples"):
        sample_sheet({"highest loss": []})
