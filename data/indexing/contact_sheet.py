"""A grid of images with captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.images.decode import Pixels

CELL = 144
"""Side in pixels of the square that an image is fitted into."""
COLUMNS = 8
_GAP, _LINE = 8, 14  # pixels
_FONT_SIZE = 11
_BACKGROUND, _INK, _FAINT = "white", "black", "#666666"


class CaptionedImage(NamedTuple):
    """Pixels, None if there are none to show, and two lines of caption."""

    pixels: Pixels | None
    title: str
    subtitle: str


def contact_sheet(images: Sequence[CaptionedImage]) -> Image.Image:
    """The images in rows of `COLUMNS`, shrunk to fit their cells."""
    columns = min(COLUMNS, max(len(images), 1))
    rows = max(-(-len(images) // columns), 1)
    sheet = Image.new("RGB", sheet_size(columns, rows), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, captioned in enumerate(images):
        left = _GAP + number % columns * (CELL + _GAP)
        top = _GAP + number // columns * (CELL + 2 * _LINE + _GAP)
        if captioned.pixels is None:
            box = (left, top, left + CELL - 1, top + CELL - 1)
            draw.rectangle(box, "#dddddd")
            draw.line(box, _FAINT)
        else:
            image = Image.fromarray(thumbnail(captioned.pixels))
            sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        for line, (text, ink) in enumerate(((captioned.title, _INK), (captioned.subtitle, _FAINT))):
            draw.text((left, top + CELL + line * _LINE), _cut(text, font), ink, font)
    return sheet


def thumbnail(pixels: Pixels) -> Pixels:
    """The image, shrunk to fit into a cell."""
    image = Image.fromarray(pixels)
    image.thumbnail((CELL, CELL))
    return np.asarray(image)


def sheet_size(columns: int, rows: int) -> tuple[int, int]:
    """Width and height in pixels of a sheet."""
    return _GAP + columns * (CELL + _GAP), _GAP + rows * (CELL + 2 * _LINE + _GAP)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of one line of text as fits below an image."""
    text = " ".join(text.split())
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "...") > CELL:
        text = text[:-1]
    return text + "..."
