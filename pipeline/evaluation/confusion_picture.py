"""The confusion matrix as a picture that can be read, also of many classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data.images.contact_sheet import cut_to_width
from data.text.printable import one_line
from pipeline.evaluation.confusion import Confusion

MOST_CLASSES = 50
"""Rows that a picture has; of more classes, those of the most confused pairs, and one row for all others."""
_CELLS = ((12, 46), (25, 34), (MOST_CLASSES, 20))  # up to that many rows: side of a cell in pixels
_WITH_NUMBERS = 34  # side of the smallest cell that a number fits into
_GAP, _LINE, _LEGEND = 10, 17, 320  # pixels
_LONGEST_NAME = 170  # pixels
_FONT_SIZE, _SMALL = 12, 10
_RIGHT, _WRONG = (23, 86, 160), (190, 30, 30)
_INK, _FAINT, _LINES, _UNKNOWN = "black", "#555555", "#d0d0d0", "#bbbbbb"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, and what it does not show, in a sentence; empty if it shows everything."""

    image: Image.Image
    remark: str


def confusion_picture(confusion: Confusion, names: Sequence[str]) -> Picture:
    """Rows are the true classes, columns the predicted ones; `names` are those of all classes."""
    remark = ""
    chosen = list(range(confusion.classes))
    if len(chosen) > MOST_CLASSES:
        chosen = confusion.most_confused(MOST_CLASSES - 1)
        others = confusion.classes - len(chosen)
        remark = (
            f"it shows {len(chosen)} of {confusion.classes:,} classes, those of the most confused pairs, and the other "
            f"{others:,} together"
        )
    shown = [one_line(names[number]) for number in chosen]
    if remark:
        shown.append(f"{confusion.classes - len(chosen):,} others")
    return Picture(_draw(confusion.dense(chosen), shown, remark), remark)


def _draw(matrix: NDArray[np.int64], names: Sequence[str], remark: str) -> Image.Image:
    font, small = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_SMALL)
    size = len(matrix)
    cell = next(side for most, side in _CELLS if size <= most)
    shown = [cut_to_width(name, font, _LONGEST_NAME) for name in names]
    margin = math.ceil(max(font.getlength(name) for name in shown)) + _GAP
    top = _GAP + 3 * _LINE + margin
    left = _GAP + _LINE + margin
    width = max(left + max(size * cell, _LEGEND) + _GAP, 2 * _GAP + math.ceil(font.getlength(_heading(remark))))
    image = Image.new("RGB", (width, top + size * cell + 2 * _GAP + 2 * _LINE), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_GAP, _GAP), _heading(remark), _INK, font)
    draw.text((left, _GAP + 2 * _LINE), "predicted class", _FAINT, font)
    _draw_upwards(image, (_GAP, top + size * cell), "true class", _FAINT, font)
    totals = matrix.sum(axis=1)
    last = 2 * (size - 1) if remark else 2 * size
    for row in range(size):
        y = top + row * cell
        draw.text((left - 4, y + cell / 2), shown[row], _INK, font, anchor="rm")
        _draw_upwards(image, (left + row * cell + cell // 2 - 8, top - 4), shown[row], _INK, font)
        for column in range(size):
            x = left + column * cell
            count = int(matrix[row, column])
            share = count / totals[row] if totals[row] else 0.0
            # Of all other classes together it is not known here which are right.
            fill = _colour(share, row == column) if row + column < last else _UNKNOWN
            draw.rectangle((x, y, x + cell, y + cell), fill, _LINES)
            if count and cell >= _WITH_NUMBERS:
                ink = "white" if share > 0.25 else _INK
                draw.text((x + cell / 2 + 0.5, y + cell / 2), _short(count), ink, small, anchor="mm")
    for line, (right, word) in enumerate(((True, "of the row right"), (False, "of the row taken for another class"))):
        x, y = left, top + size * cell + _GAP + line * _LINE
        for share in (0.0, 0.01, 0.05, 0.25, 1.0):
            draw.rectangle((x, y, x + 30, y + 14), _colour(share, right), _LINES)
            draw.text((x + 15, y + 7), f"{share:.0%}", "white" if share > 0.2 else _INK, small, anchor="mm")
            x += 30
        draw.text((x + 5, y + 2), word, _FAINT, small)
    return image


def _heading(remark: str) -> str:
    return f"Confusion matrix{': ' if remark else ''}{remark}"


def _draw_upwards(
    image: Image.Image, corner: tuple[int, int], text: str, ink: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """Draw text from bottom to top; `corner` is the lower left one."""
    length = math.ceil(font.getlength(text)) + 2
    strip = Image.new("RGB", (length, _LINE), "white")
    ImageDraw.Draw(strip).text((0, 0), text, ink, font)
    image.paste(strip.rotate(90, expand=True), (corner[0], corner[1] - length))


def _colour(share: float, right: bool) -> tuple[int, int, int]:
    """From white to the full colour; the square root makes a hundredth visible."""
    strength = math.sqrt(min(1.0, share))
    red, green, blue = (round(255 + strength * (full - 255)) for full in (_RIGHT if right else _WRONG))
    return red, green, blue


def _short(count: int) -> str:
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * unit:
            return f"{count // unit}{letter}"
        if count >= unit and unit > 10**3:
            return f"{count / unit:.1f}{letter}"
    return str(count)
