"""HTML from text that may come from anywhere: everything is escaped here, in one place."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from data.images.decode import MAX_PIXELS
from data.text.printable import printable

_WIDEST = 1200  # pixels, which is as wide as the page
_NARROW = 480  # narrower pictures are enlarged without smoothing, so that their pixels can be seen
_LARGEST_PNG = 300_000  # bytes; photographs above that become JPEGs


class Markup(str):
    """HTML, in which all text is escaped."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """Text as HTML; what is no visible character is shown as an escape, and web addresses without their secrets."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value)), quote=True))


def joined(parts: Iterable[object], separator: str = "") -> Markup:
    """Parts one after the other; those that are not markup are escaped."""
    return Markup(escaped(separator).join(escaped(part) for part in parts))


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """An element. Attributes that are None are left out; `class_` is `class`, and other underscores are dashes."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>{joined(content)}</{tag}>")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Markup:
    """A table; the columns in `right` are numbers, and the first one is not broken up."""
    kinds = ["number" if heading in right else None for heading in headings]
    cells = [kind or ("name" if number == 0 else None) for number, kind in enumerate(kinds)]
    head = (element("th", heading, class_=kind, scope="col") for heading, kind in zip(headings, kinds, strict=True))
    body = (
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, cells, strict=True)))
        for row in rows
    )
    content = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", content, class_="scrolls")


def facts(rows: Iterable[tuple[str, object]]) -> Markup:
    """Names and their values."""
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in rows))


def folded(summary: object, *content: object) -> Markup:
    """Content that is shown on demand, and in print."""
    return element("details", element("summary", summary), *content)


def picture(encoded: bytes, description: str) -> Markup:
    """An image in the page, decoded and encoded again, 480 to 1,200 pixels wide.

    Raises:
        ValueError: it is no PNG or JPEG, is damaged, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels")
            pixels = image.convert("RGB")
    except ValueError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from None
    if pixels.width < _NARROW:
        factor = -(-_NARROW // pixels.width)
        pixels = pixels.resize((pixels.width * factor, pixels.height * factor), Image.Resampling.NEAREST)
    if pixels.width > _WIDEST:
        pixels = pixels.resize((_WIDEST, max(1, round(pixels.height * _WIDEST / pixels.width))))
    kind, content = "png", _encoded(pixels, "PNG", optimize=True)
    if len(content) > _LARGEST_PNG:
        kind, content = "jpeg", _encoded(pixels, "JPEG", quality=88)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    size = f'width="{pixels.width}" height="{pixels.height}"'
    return Markup(f'<img src="{source}" alt="{escaped(description)}" {size}>')


def _encoded(image: Image.Image, kind: str, **options: bool | int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
