"""Many pictures with captions in one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.decode import Pixels

CELL = 144
"""Side in pixels of the square that a picture is fitted into."""
COLUMNS = 8
_GAP, _LINE = 8, 14  # pixels
_FONT_SIZE = 11
_BACKGROUND, _INK, _FAINT = "white", "black", "#666666"


class Picture(NamedTuple):
    """Pixels, None where there are none to show, and two lines below them."""

    pixels: Pixels | None
    title: str
    subtitle: str


def contact_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """The pictures in rows of `COLUMNS`, larger ones made smaller, smaller ones as they are."""
    columns = min(COLUMNS, max(len(pictures), 1))
    rows = max(-(-len(pictures) // columns), 1)
    sheet = Image.new("RGB", sheet_size(columns, rows), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, picture in enumerate(pictures):
        left = _GAP + number % columns * (CELL + _GAP)
        top = _GAP + number // columns * (CELL + 2 * _LINE + _GAP)
        if picture.pixels is None:
            box = (left, top, left + CELL - 1, top + CELL - 1)
            draw.rectangle(box, "#dddddd")
            draw.line(box, _FAINT)
        else:
            image = Image.fromarray(thumbnail(picture.pixels))
            sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        for line, (text, ink) in enumerate(((picture.title, _INK), (picture.subtitle, _FAINT))):
            draw.text((left, top + CELL + line * _LINE), _cut(text, font), ink, font)
    return sheet


def thumbnail(pixels: Pixels) -> Pixels:
    """The picture, made smaller to fit into a cell; a smaller one as it is."""
    image = Image.fromarray(pixels)
    image.thumbnail((CELL, CELL))
    return np.asarray(image)


def sheet_size(columns: int, rows: int) -> tuple[int, int]:
    """Width and height in pixels of a sheet."""
    return _GAP + columns * (CELL + _GAP), _GAP + rows * (CELL + 2 * _LINE + _GAP)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of one line of text as fits below a picture."""
    text = " ".join(text.split())
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "...") > CELL:
        text = text[:-1]
    return text + "..."
