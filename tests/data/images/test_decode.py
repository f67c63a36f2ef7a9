"""Decoding: every common kind of image becomes RGB; damage and decompression bombs raise a DecodeError and nothing else."""

import gzip
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.images.decode import MAX_PIXELS, DecodeError, decode

RAMP = np.add.outer(np.arange(40), np.arange(52)).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 40, (40, 52, 3), dtype=np.uint8)
PICTURE = Image.fromarray(np.stack([RAMP * 2, RAMP[::-1], RAMP[:, ::-1]], axis=-1) + NOISE)
TRANSLUCENT = PICTURE.convert("RGBA")
TRANSLUCENT.putalpha(Image.fromarray(RAMP + 150))


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    (TRANSLUCENT if mode == "RGBA" else PICTURE.convert(mode)).save(file, kind, **options)
    return file.getvalue()


FILES = {
    "JPEG": encoded("JPEG"),
    "progressive JPEG": encoded("JPEG", progressive=True),
    "grey JPEG": encoded("JPEG", "L"),
    "CMYK JPEG": encoded("JPEG", "CMYK"),
    "PNG": encoded("PNG"),
    "black and white PNG": encoded("PNG", "1"),
    "palette PNG": encoded("PNG", "P"),
    "palette PNG with transparency": encoded("PNG", "P", transparency=bytes(range(9))),
    "RGBA PNG": encoded("PNG", "RGBA"),
    "WebP": encoded("WEBP"),
    "lossless WebP": encoded("WEBP", lossless=True),
    "RGBA WebP": encoded("WEBP", "RGBA", exif=b"Exif\0\0"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_common_kind_of_image_decodes_to_the_rgb_of_pillow(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reader threads warn into the log of a run otherwise
        pixels = decode(FILES[name])
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGBA").convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_of_sixteen_bits_the_upper_eight_are_kept(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (24, 32, channels), dtype=np.uint16)
    file = cv2.imencode(".png", levels)[1].tobytes()
    # OpenCV's order is blue, green, red.
    assert np.array_equal(decode(file), np.repeat(levels >> 8, 3, axis=2) if channels == 1 else levels[..., 2::-1] >> 8)


def test_the_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert np.array_equal(decode(encoded("JPEG", exif=exif)), decode(FILES["JPEG"]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^empty file$"),
        (b"text", "^neither JPEG, PNG nor WebP$"),
        (b"\xff\xd8\xff\xe0 but no more", "^damaged: "),
        (encoded("GIF"), "^a GIF, not a JPEG, PNG or WebP; coatnet shards build --convert"),
        (encoded("BMP"), "^a BMP, .* --convert"),
        (encoded("TIFF"), "^a TIFF, .* --convert"),
        (b"MM\0*" + bytes(60), "^a TIFF, .* --convert"),
        (encoded("AVIF"), "^an AVIF, .* convert it to JPEG"),
        (gzip.compress(FILES["JPEG"], mtime=0), "^compressed with gzip, .* coatnet shards build unpacks it$"),
        (FILES["PNG"][:40], "^damaged: "),
        (FILES["WebP"][:16] + b"\0" * 40, "^damaged: "),
    ],
    ids=[
        "empty",
        "text",
        "header-alone",
        "gif",
        "bmp",
        "tiff",
        "tiff-big-endian",
        "avif",
        "gzip",
        "half-a-header",
        "webp",
    ],
)
def test_bytes_that_are_not_an_image_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_image_is_refused_instead_of_padded(name: str, share: float) -> None:
    with pytest.raises(DecodeError):
        decode(FILES[name][: int(share * len(FILES[name]))])


def png_claiming(width: int, height: int) -> bytes:
    data = bytearray(FILES["PNG"])
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(FILES["JPEG"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_claiming(kind: str, width: int, height: int) -> bytes:
    data = bytearray(FILES[kind])
    if kind == "WebP":
        data[26:30] = struct.pack("<HH", width, height)
    elif kind == "lossless WebP":
        data[21:25] = struct.pack("<I", width - 1 | height - 1 << 14)
    else:
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("bomb", "size"),
    [
        (png_claiming(30_000, 30_000), "30,000 x 30,000"),
        (jpeg_claiming(65_000, 40_000), "65,000 x 40,000"),
        (webp_claiming("WebP", 16_000, 15_000), "16,000 x 15,000"),
        (webp_claiming("lossless WebP", 16_000, 15_000), "16,000 x 15,000"),
        (webp_claiming("RGBA WebP", 30_000, 20_000), "30,000 x 20,000"),
    ],
    ids=["png", "jpeg", "webp", "lossless-webp", "extended-webp"],
)
def test_images_above_the_pixel_limit_are_refused_by_their_header(bomb: bytes, size: str) -> None:
    with pytest.raises(DecodeError, match=f"^{size} pixels exceed the limit of {MAX_PIXELS:,}"):
        decode(bomb)


# No deadline: how long a machine takes is not what is tested.
@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    places=st.lists(st.integers(0, 400) | st.integers(0, 10**6), min_size=1, max_size=8),
    values=st.binary(min_size=8, max_size=8),
    cut=st.none() | st.integers(1, 10**6),
)
def test_damaged_bytes_give_pixels_or_a_decode_error(
    name: str, places: list[int], values: bytes, cut: int | None
) -> None:
    data = bytearray(FILES[name])
    for place, value in zip(places, values, strict=False):
        data[place % len(data)] = value
    try:
        pixels = decode(bytes(data[:cut]))
    except DecodeError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.size <= 3 * MAX_PIXELS


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBPVP8X"])
)
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes, start: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(start + data)


def test_a_truncated_jpeg_is_refused(pictures: Path) -> None:
    whole = (pictures / "dark" / "0000.jpg").read_bytes()
    with pytest.raises(DecodeError):
        decode(whole[: len(whole) // 2])
