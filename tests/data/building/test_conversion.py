"""Kinds of images, and their conversion."""

import io

import numpy as np
import pytest
from PIL import Image

from data.building.conversion import Conversion, Kind, check_image
from data.images.decode import DecodeError, decode


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Red to the right, green to the bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(orientation: int, kind: str = "JPEG") -> bytes:
    """The image as stored by a camera that writes `orientation` into the EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    turn = turns[orientation]
    image = picture() if turn is None else picture().transpose(turn)
    return encoded(image, kind, exif=exif, quality=95, subsampling=0)


KINDS = {
    "rgb": (encoded(picture()), "jpg", Kind(0)),
    "grey": (encoded(picture().convert("L")), "jpg", Kind.GREY),
    "cmyk": (encoded(picture().convert("CMYK")), "jpg", Kind.CMYK),
    "png": (encoded(picture(), "PNG"), "png", Kind.PNG),
    "grey png": (encoded(picture().convert("L"), "PNG"), "png", Kind.PNG | Kind.GREY),
    "palette png": (encoded(picture().convert("P"), "PNG"), "png", Kind.PNG),
    "webp": (encoded(picture(), "WEBP"), "webp", Kind.WEBP),
    "rotated": (rotated(6), "jpg", Kind.EXIF_ROTATED),
    "upright by EXIF": (rotated(1), "jpg", Kind(0)),
    "rotated png": (rotated(3, "PNG"), "png", Kind.PNG | Kind.EXIF_ROTATED),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_image_keeps_its_bytes_and_its_kind_is_reported(name: str) -> None:
    data, extension, kind = KINDS[name]
    checked = check_image(data, Conversion())
    assert (checked.encoded, checked.extension, checked.kind) == (data, extension, kind)


@pytest.mark.parametrize("name", KINDS)
def test_a_conversion_leaves_only_upright_rgb_jpegs(name: str) -> None:
    data, _, kind = KINDS[name]
    checked = check_image(data, Conversion(convert=True))
    assert checked.kind == (kind | Kind.ENCODED_AGAIN if kind else kind)
    assert (checked.encoded == data) == (not kind)
    again = check_image(checked.encoded, Conversion(convert=True))
    assert (again.kind, again.extension, again.encoded) == (Kind(0), "jpg", checked.encoded)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_converted_image_is_upright(orientation: int) -> None:
    pixels = decode(check_image(rotated(orientation), Conversion(convert=True)).encoded)
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.astype(int) - np.asarray(picture()).astype(int)).max() <= 12


@pytest.mark.parametrize(
    ("width", "height", "shrunk"),
    [(40, 30, (20, 27)), (30, 40, (27, 20)), (21, 100, (95, 20)), (20, 50, None), (10, 10, None), (30, 30, (20, 20))],
)
def test_only_images_with_a_longer_short_side_shrink(width: int, height: int, shrunk: tuple[int, int] | None) -> None:
    data = encoded(picture(width, height))
    checked = check_image(data, Conversion(short_side=20, quality=92))
    if shrunk is None:
        assert (checked.encoded, checked.kind) == (data, Kind(0))
    else:
        assert checked.kind == Kind.SHRUNK | Kind.ENCODED_AGAIN
        assert decode(checked.encoded).shape[:2] == shrunk


def test_a_rotated_image_that_shrinks_is_turned_upright() -> None:
    checked = check_image(rotated(6), Conversion(short_side=15))
    assert decode(checked.encoded).shape[:2] == (15, 20)
    assert check_image(checked.encoded, Conversion()).kind == Kind(0)


def test_an_encoded_image_keeps_the_resolution_of_its_colours() -> None:
    checked = check_image(encoded(picture(), "PNG"), Conversion(convert=True, quality=92))
    with Image.open(io.BytesIO(checked.encoded)) as image:
        assert image.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("data", [b"", b"no image", KINDS["rgb"][0][:400], KINDS["png"][0][:100]])
def test_undecodable_images_raise_an_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        check_image(data, Conversion())
