"""Contact sheets: images in rows with captions."""

import numpy as np
from PIL import ImageFont

from data.images.contact_sheet import (
    CELL,
    RIGHT,
    CaptionedImage,
    contact_sheet,
    cut_in_the_middle,
    cut_to_width,
    sheet_size,
)


def test_a_contact_sheet_arranges_images_in_rows_and_shrinks_large_ones() -> None:
    small = np.full((10, 20, 3), (255, 0, 0), np.uint8)
    large = np.full((400, 800, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet(
        [CaptionedImage(small, "a", "b"), CaptionedImage(large, "x" * 500, "y"), CaptionedImage(None, "z", "")] * 3
    )
    assert sheet.size == sheet_size(columns=8, rows=2)
    pixels = np.asarray(sheet)
    red, blue = ((pixels == color).all(axis=2) for color in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() == 3 * small.shape[0] * small.shape[1]
    assert blue.sum() == 3 * CELL * CELL // 2
    rows, columns = np.nonzero(red[: CELL + 16, : CELL + 16])
    assert (int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1) == small.shape[:2]
    assert (pixels[:, 2 * CELL + 16 : 2 * CELL + 24] == 255).all(), "captions end at their cell"


def test_a_sheet_may_have_larger_cells_more_lines_and_a_colour() -> None:
    grey = np.full((10, 20, 3), 128, np.uint8)
    sheet = contact_sheet([CaptionedImage(grey, "dog 98 %", "a.jpg", RIGHT, ("cat 1 %", "label: dog"))], 200, 5)
    assert sheet.size == sheet_size(1, 1, 200, lines=4)
    red, green, _ = np.moveaxis(np.asarray(sheet).astype(int), 2, 0)
    rows = np.nonzero(green > red + 20)[0]
    assert rows.min() >= 200
    assert rows.max() < 200 + 8 + 14, "the colour is that of the first line alone"
    assert (np.asarray(sheet)[200 + 8 + 3 * 14 :] < 200).any(), "the fourth line is drawn"


def test_captions_show_escapes_for_what_is_no_visible_character() -> None:
    hostile, escaped = (contact_sheet([CaptionedImage(None, text, "")]) for text in ("a\x1b[2Jb", "a\\x1b[2Jb"))
    assert np.array_equal(np.asarray(hostile), np.asarray(escaped))


def test_a_caption_that_is_cut_in_the_middle_keeps_its_beginning_and_its_end() -> None:
    assert cut_in_the_middle("train/0001.jpg") == "train/0001.jpg"
    key = "train/n01440764/" + "x" * 500 + "/0001.jpg"
    beginning, end = cut_in_the_middle(key).split("...")
    assert key.startswith(beginning)
    assert key.endswith(end)
    assert min(len(beginning), len(end)) > len("/0001.jpg")
    shown = cut_in_the_middle(key)
    assert cut_to_width(shown, ImageFont.load_default(11), CELL) == shown, "it fits"
    assert len(cut_in_the_middle(key, 2 * CELL)) > 1.5 * len(shown)
    assert cut_in_the_middle("a\x1b[2Jb") == "a\\x1b[2Jb"
