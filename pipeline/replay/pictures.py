"""Samples of a step as the model saw them, with their predictions and losses, as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data.images.contact_sheet import INK, RIGHT, WRONG, CaptionedImage, contact_sheet, cut_in_the_middle, enlarged
from data.images.decode import Pixels

_CELL = 176
_COLUMNS = 6
_HEADING, _HEADING_SIZE, _MARGIN = 30, 16, 8  # pixels


@dataclass(frozen=True, slots=True, eq=False)
class SeenSample:
    """A sample of a micro-batch as the model saw it, and what it made of it."""

    key: str
    label: str
    """Name of the class, or of the first one of several."""
    predicted: str
    """Name of the class with the highest probability."""
    probability: float
    """Of the predicted class, 0 to 1."""
    loss: float
    pixels: Pixels
    """(S, S, 3) uint8."""


def sample_sheet(rows: Mapping[str, Sequence[SeenSample]]) -> NDArray[np.uint8]:
    """The samples below their headings, such as `highest loss`, in rows of six: (height, width, 3) uint8.

    A heading without samples is left out. Small images are enlarged without smoothing.

    Raises:
        ValueError: there are no samples.
    """
    sections = [(heading, _section(samples)) for heading, samples in rows.items() if samples]
    if not sections:
        raise ValueError("no samples to show")
    size = (max(one.width for _, one in sections), sum(_HEADING + one.height for _, one in sections))
    sheet = Image.new("RGB", size, "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(_HEADING_SIZE), 0
    for heading, section in sections:
        draw.text((_MARGIN, top + _HEADING // 2), heading, INK, font, anchor="lm")
        sheet.paste(section, (0, top + _HEADING))
        top += _HEADING + section.height
    return np.asarray(sheet)


def _section(samples: Sequence[SeenSample]) -> Image.Image:
    return contact_sheet(
        [
            CaptionedImage(
                enlarged(one.pixels, _CELL),
                f"{one.probability:.1%} {one.predicted}",
                f"is {one.label}",
                RIGHT if one.predicted == one.label else WRONG,
                (f"loss {one.loss:.4g}", cut_in_the_middle(one.key, _CELL)),
            )
            for one in samples
        ],
        _CELL,
        _COLUMNS,
    )
