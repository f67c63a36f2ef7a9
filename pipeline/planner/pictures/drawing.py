"""Rectangles, lines, polygons and texts at known places, and the image of them.

The pictures are laid out as these first, so that places can be computed with and tested without looking at pixels.
All coordinates are pixels of the image, from its upper left corner.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from data.images.contact_sheet import cut_to_width

Point = tuple[float, float]

WIDTH = 1120
"""Of every picture, in pixels."""
MARGIN = 28
TITLE, NORMAL, SMALL = 20, 14, 12
"""Sizes of the font, in pixels."""
INK, SOFT, AXIS, GRID, BACK = "#1b2430", "#566273", "#8b97a7", "#e8ecf1", "#f5f7f9"
BLUE, LIGHT_BLUE, ORANGE, TEAL, LIGHT_TEAL = "#1d5fbf", "#8fb1df", "#b45309", "#0f766e", "#86c5be"
PURPLE, RED, LIGHT_RED, GREEN = "#7c3aed", "#b91c1c", "#eab8b5", "#15803d"
"""The palette of the report of a run, see `jobs/report/style.py`, and lighter tones of it."""
_OVERSAMPLING = 4  # Pillow draws no partial pixels
_HALO = 3  # pixels of white around a text that may stand on a line


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A filled rectangle; `of` says what it stands for, and is empty for decoration."""

    left: float
    top: float
    right: float
    bottom: float
    fill: str
    of: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        """In pixels."""
        return self.right - self.left


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points; `dashes` are the lengths of a dash and of the space after it."""

    points: tuple[Point, ...]
    ink: str
    width: float = 1.0
    dashes: tuple[float, float] | None = None
    of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Polygon:
    """A filled polygon."""

    points: tuple[Point, ...]
    fill: str
    of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled circle with a white rim."""

    x: float
    y: float
    radius: float
    fill: str
    of: tuple[str, ...] = ()


Shape = Rectangle | Line | Polygon | Dot


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text; `anchor` is Pillow's, as "lm" for the middle of its left edge at (x, y)."""

    x: float
    y: float
    text: str
    ink: str = INK
    size: int = NORMAL
    anchor: str = "lm"
    halo: bool = False
    """Whether it has a white rim, for texts on lines."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of its ink."""
        left, top, right, bottom = font(self.size).getbbox(self.text, anchor=self.anchor)
        x, y = round(self.x), round(self.y)
        return x + left, y + top, x + right, y + bottom


@dataclass(frozen=True)
class Drawing:
    """What a picture consists of, from the bottom to the top; all texts are above all shapes."""

    height: int
    shapes: Sequence[Shape]
    texts: Sequence[Text]
    width: int = WIDTH

    def standing_for(self, *of: str) -> list[Shape]:
        """The shapes whose `of` begins with these."""
        return [shape for shape in self.shapes if shape.of[: len(of)] == of]

    @cached_property
    def image(self) -> Image.Image:
        """RGB, (height, width)."""
        times = _OVERSAMPLING
        large = Image.new("RGB", (self.width * times, self.height * times), "white")
        draw = ImageDraw.Draw(large)
        for shape in self.shapes:
            _draw(draw, shape, times)
        image = large.reduce(times)
        draw = ImageDraw.Draw(image)
        for text in self.texts:
            draw.text(
                (round(text.x), round(text.y)), text.text, text.ink, font(text.size), anchor=text.anchor,
                stroke_width=_HALO if text.halo else 0, stroke_fill="white" if text.halo else None,
            )  # fmt: skip
        return image


@dataclass(slots=True)
class Shapes:
    """Shapes and texts that are being collected."""

    shapes: list[Shape] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    def add(self, *marks: Shape | Text) -> None:
        """Add them on top of what is there."""
        for mark in marks:
            if isinstance(mark, Text):
                self.texts.append(mark)
            else:
                self.shapes.append(mark)

    def drawing(self, height: float) -> Drawing:
        """A picture of them."""
        return Drawing(math.ceil(height), tuple(self.shapes), tuple(self.texts))


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is the same on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int = NORMAL) -> int:
    """In whole pixels, rounded up."""
    return math.ceil(font(size).getlength(text))


def fitted(text: str, width: float, size: int = NORMAL) -> str:
    """`text`, or its beginning and "..." if it is wider than `width` pixels."""
    return cut_to_width(text, font(size), math.floor(width))


def wrapped(text: str, width: float, size: int = NORMAL) -> list[str]:
    """The words of `text` in lines of up to `width` pixels; longer words are cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(fitted(word, width, size))
    return lines


def vertical(x: float, top: float, bottom: float, ink: str, width: float = 1.0, *of: str) -> Line:
    """A vertical line."""
    return Line(((x, top), (x, bottom)), ink, width, of=of)


def ink_on(fill: str) -> str:
    """The colour of texts on a filled shape, by its brightness as ITU-R 601 weighs it."""
    red, green, blue = (int(fill[place : place + 2], 16) for place in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _draw(draw: ImageDraw.ImageDraw, shape: Shape, times: int) -> None:
    match shape:
        case Rectangle():
            _rectangle(draw, shape.left, shape.top, shape.right, shape.bottom, shape.fill, times)
        case Line():
            for start, end in _dashed(shape.points, shape.dashes) if shape.dashes else pairwise(shape.points):
                _segment(draw, start, end, shape, times)
        case Polygon():
            draw.polygon([(x * times, y * times) for x, y in shape.points], shape.fill)
        case Dot():
            for radius, fill in ((shape.radius + 1.5, "white"), (shape.radius, shape.fill)):
                box = (shape.x - radius, shape.y - radius, shape.x + radius, shape.y + radius)
                draw.ellipse([place * times for place in box], fill)


def _segment(draw: ImageDraw.ImageDraw, start: Point, end: Point, line: Line, times: int) -> None:
    """Thin lines along an axis cover whole pixels, or they would be pale and wide."""
    half = line.width / 2
    if start[0] == end[0]:
        left = round(start[0] - half)
        _rectangle(draw, left, min(start[1], end[1]), left + line.width, max(start[1], end[1]), line.ink, times)
    elif start[1] == end[1]:
        top = round(start[1] - half)
        _rectangle(draw, min(start[0], end[0]), top, max(start[0], end[0]), top + line.width, line.ink, times)
    else:
        places = [(x * times, y * times) for x, y in (start, end)]
        draw.line(places, line.ink, round(line.width * times))
        for x, y in places:  # round ends, which join
            radius = line.width * times / 2
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), line.ink)


def _rectangle(
    draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, fill: str, times: int
) -> None:
    """Pillow's rectangles include their last row and column."""
    first, last = (round(left * times), round(top * times)), (round(right * times) - 1, round(bottom * times) - 1)
    if last[0] >= first[0] and last[1] >= first[1]:
        draw.rectangle((*first, *last), fill)


def _dashed(points: Sequence[Point], dashes: tuple[float, float]) -> Iterator[tuple[Point, Point]]:
    """The dashes along a line; each piece of it begins with one."""
    dash, period = dashes[0], sum(dashes)
    for (x1, y1), (x2, y2) in pairwise(points):
        length = math.hypot(x2 - x1, y2 - y1)
        for number in range(math.ceil(length / period)):
            begin, end = number * period / length, min(1.0, (number * period + dash) / length)
            yield (
                (x1 + (x2 - x1) * begin, y1 + (y2 - y1) * begin),
                (x1 + (x2 - x1) * end, y1 + (y2 - y1) * end),
            )
