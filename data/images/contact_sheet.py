"""A grid of images with captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.images.decode import Pixels
from data.text.printable import one_line

CELL = 144
"""Side in pixels of the square that an image is fitted into, by default."""
COLUMNS = 8
INK, FAINT, RIGHT, WRONG = "black", "#666666", "#1a7f37", "#b3261e"
"""Colours of captions."""
_GAP, _LINE = 8, 14  # pixels
_FONT_SIZE = 11
_BACKGROUND = "white"


class CaptionedImage(NamedTuple):
    """Pixels, None if there are none to show; two lines of caption, of which the first may have a colour; and more
    lines, fainter ones."""

    pixels: Pixels | None
    title: str
    subtitle: str
    ink: str = INK
    lines: tuple[str, ...] = ()


def contact_sheet(images: Sequence[CaptionedImage], cell: int = CELL, columns: int = COLUMNS) -> Image.Image:
    """The images in rows of up to `columns`, shrunk to fit cells of `cell` pixels; captions end at their cell."""
    columns = min(columns, max(len(images), 1))
    rows = max(-(-len(images) // columns), 1)
    lines = 2 + max((len(one.lines) for one in images), default=0)
    sheet = Image.new("RGB", sheet_size(columns, rows, cell, lines), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, captioned in enumerate(images):
        left = _GAP + number % columns * (cell + _GAP)
        top = _GAP + number // columns * (cell + lines * _LINE + _GAP)
        if captioned.pixels is None:
            box = (left, top, left + cell - 1, top + cell - 1)
            draw.rectangle(box, "#dddddd")
            draw.line(box, FAINT)
        else:
            image = Image.fromarray(thumbnail(captioned.pixels, cell))
            sheet.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))
        for line, text in enumerate((captioned.title, captioned.subtitle, *captioned.lines)):
            ink = FAINT if line else captioned.ink
            shown = cut_to_width(" ".join(one_line(text).split()), font, cell)
            draw.text((left, top + cell + line * _LINE), shown, ink, font)
    return sheet


def thumbnail(pixels: Pixels, cell: int = CELL) -> Pixels:
    """The image, shrunk to fit into a cell."""
    image = Image.fromarray(pixels)
    image.thumbnail((cell, cell))
    return np.asarray(image)


def enlarged(pixels: Pixels, cell: int = CELL) -> Pixels:
    """A small image with each pixel repeated as often as fits into a cell; one that is larger as it is."""
    times = max(1, cell // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def sheet_size(columns: int, rows: int, cell: int = CELL, lines: int = 2) -> tuple[int, int]:
    """Width and height in pixels of a sheet of cells with `lines` lines of caption."""
    return _GAP + columns * (cell + _GAP), _GAP + rows * (cell + lines * _LINE + _GAP)


def cut_to_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a line of text as fits into `width` pixels, with "..." after it if that is not all."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def cut_in_the_middle(text: str, cell: int = CELL) -> str:
    """The beginning and the end of a caption with "..." between them, or all of it if it fits into its cell."""
    font = ImageFont.load_default(_FONT_SIZE)
    shown = text = " ".join(one_line(text).split())
    left = len(text)
    while left > 1 and font.getlength(shown) > cell:
        left -= 1
        shown = f"{text[: left // 2]}...{text[len(text) - (left - left // 2) :]}"
    return shown
