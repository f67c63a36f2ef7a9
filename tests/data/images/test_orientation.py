"""The orientation that cameras note in JPEGs."""

import io

import pytest
from PIL import Image

from data.images.orientation import is_turned


def jpeg(orientation: int | None, image_format: str = "JPEG") -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    Image.new("RGB", (8, 6)).save(file, image_format, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("orientation", "turned"), [(None, False), (1, False), (3, True), (6, True), (8, True), (0, False), (9, False)]
)
def test_only_orientations_that_turn_or_mirror_count(orientation: int | None, turned: bool) -> None:
    assert is_turned(jpeg(orientation)) == turned


def test_what_has_no_exif_data_or_damaged_ones_is_not_turned() -> None:
    whole = jpeg(6)
    at = whole.index(b"Exif\0\0") + 6
    assert not is_turned(whole[:at] + bytes(40) + whole[at + 40 :])
    assert not any(is_turned(content) for content in (b"", b"\xff\xd8", b"GIF89a", whole[: at + 4], jpeg(6, "PNG")))
