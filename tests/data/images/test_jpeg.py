"""JPEGs: what libjpeg only warns of decodes to Pillow's pixels unless pixels are lost; all sampling factors decode."""

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data.building.conversion import Conversion, Kind, check_image
from data.images.decode import DecodeError, decode

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
SCAN, EOI = b"\xff\xda", b"\xff\xd9"

# Written by cjpeg of libjpeg-turbo, whose sampling factors are free; no encoder in Python has these.
BY_CJPEG = {
    name: base64.b64decode(text)
    for name, text in {
        "4x1,2x1,2x1": (
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
            "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
            "T09PT09PT0//wAARCAAYACADAUEAAiEBAyEB/8QAFgABAQEAAAAAAAAAAAAAAAAABAUG/8QAFhAAAwAAAAAAAAAAAAAAAAAAAAID"
            "/8QAGAEAAwEBAAAAAAAAAAAAAAAAAwQGAgX/xAAXEQADAQAAAAAAAAAAAAAAAAAAAgME/9oADAMBAAIRAxEAPwCPFh8WKEWHxY3q"
            "mTeqZyVkGWRjYsPiw+LFCLFnqmTeqY6sgyyMbFh8WHxYfFiz1TJvVMdWQZZH/9k="
        ),
        "2x1,1x1,2x1": (
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
            "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
            "T09PT09PT0//wAARCAAYACADASEAAhEBAyEB/8QAFgABAQEAAAAAAAAAAAAAAAAABAUG/8QAFhAAAwAAAAAAAAAAAAAAAAAAAAID"
            "/8QAGAEBAQEBAQAAAAAAAAAAAAAAAgYEAwX/xAAXEQADAQAAAAAAAAAAAAAAAAAAAQME/9oADAMBAAIRAxEAPwCPFh8WHqmeOpDU"
            "ihFh8WJvVMakNSMbFh8WLPVM1qQlIfFihFib1TOikJSMbFh8WLPVM1qQ1IfFh8WJvVMakNSP/9k="
        ),
        "1x1,2x2,2x2": (
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
            "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
            "T09PT09PT0//wAARCAAYACADAREAAiIBAyIB/8QAFQABAQAAAAAAAAAAAAAAAAAABQb/xAAZEAADAAMAAAAAAAAAAAAAAAAAAQQC"
            "ITH/xAAZAQADAQEBAAAAAAAAAAAAAAAAAgUGBAf/xAAWEQEBAQAAAAAAAAAAAAAAAAADAAH/2gAMAwEAAhEDEQA/ADYs+HYp01Tt"
            "Cp01To+FPhVHCmwp6LPhnlOmKdolOmqdPwp8Ko4U2FTUTej0ZTpinEXXhT4URPRN6JqnTVOInwp8KIv/2Q=="
        ),
        "arithmetic": (
            "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
            "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
            "T09PT09PT0//yQARCAAYACADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD+5AYTkoBwTJ/9u5Z8z2Fisd072nec"
            "KriclsPZCUW0xp4qvhPgWrg+GnsyS3lN5CJy3aG5QuSo/9k="
        ),
    }.items()
}


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    PICTURE.convert(mode).save(file, "JPEG", quality=85, **options)
    return file.getvalue()


PLAIN, PROGRESSIVE, CMYK = jpeg(), jpeg(progressive=True), jpeg("CMYK")
RESTARTING = jpeg(restart_marker_blocks=4)


def by_pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def sampled(encoded: bytes, *factors: int) -> bytes:
    """With other sampling factors of the components in the frame header."""
    patched, frame = bytearray(encoded), encoded.index(b"\xff\xc0")
    for number, factor in enumerate(factors):
        patched[frame + 11 + 3 * number] = factor
    return bytes(patched)


def padded(encoded: bytes, padding: bytes) -> bytes:
    end = encoded.rindex(EOI)
    return encoded[:end] + padding + encoded[end:]


def after_start(encoded: bytes, inserted: bytes) -> bytes:
    return encoded[:2] + inserted + encoded[2:]


def changed(encoded: bytes, start: bytes, offset: int, value: bytes) -> bytes:
    at = encoded.index(start) + offset
    return encoded[:at] + value + encoded[at + len(value) :]


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
# Four times as many luminance blocks as of each chrominance, beside or above one another.
FOUR_TO_ONE = simplejpeg.encode_jpeg(np.asarray(PICTURE.resize((64, 64))), colorsubsampling="411")

HARMLESS = {
    "zeros before EOI": padded(PLAIN, b"\0" * 64),
    "one byte before EOI": padded(PLAIN, b"\0"),
    "counting bytes before EOI": padded(PLAIN, bytes(range(1, 21))),
    "noise before EOI": padded(PLAIN, RNG.bytes(700).replace(b"\xff", b"\xff\0")),
    "fill bytes before EOI": padded(PLAIN, b"\xff" * 9),
    "padding in a progressive JPEG": padded(PROGRESSIVE, b"\0" * 40),
    "padding in a CMYK JPEG": padded(CMYK, b"pad" * 40),
    "padding in a grey JPEG": padded(jpeg("L"), b"pad" * 40),
    "bytes behind EOI": PLAIN + b"anything",
    "JFIF 3.7": changed(PLAIN, b"JFIF", 5, b"\3\7"),
    "JFIF 3.7 and padding": padded(changed(PLAIN, b"JFIF", 5, b"\3\7"), b"\0" * 30),
    "unknown Adobe transform": after_start(PLAIN, ADOBE + b"\x07"),
    "unknown Adobe transform of four components": changed(CMYK, b"Adobe", 11, b"\x01"),
    "YCCK": changed(CMYK, b"Adobe", 11, b"\x02"),
    "scan parameters of a sequential JPEG": changed(PLAIN, SCAN, 11, b"\x01\x3e\x00"),
    "broken colour profile": after_start(PLAIN, b"\xff\xe2\x00\x12ICC_PROFILE\x00\x09\x02??"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_loses_no_pixels_decodes_as_by_pillow(name: str) -> None:
    assert np.array_equal(decode(HARMLESS[name]), by_pillow(HARMLESS[name]))


@pytest.mark.parametrize("junk", [b"\1\2", b"\0\0\0", b"\xff\0"])
@pytest.mark.parametrize("marker", [b"\xff\xe0", b"\xff\xdb", b"\xff\xc4"])
def test_bytes_between_the_segments_of_the_header_are_passed_over(junk: bytes, marker: bytes) -> None:
    # Pillow refuses some of these, libjpeg none.
    assert np.array_equal(decode(PLAIN.replace(marker, junk + marker, 1)), decode(PLAIN))


@pytest.mark.parametrize(
    "encoded",
    [
        sampled(FOUR_TO_ONE, 0x14, 0x11, 0x11),
        sampled(jpeg("L"), 0x34),
        *(BY_CJPEG[name] for name in BY_CJPEG),
        padded(BY_CJPEG["4x1,2x1,2x1"], b"\0" * 20),
    ],
    ids=["1x4,1x1,1x1", "grey-3x4", *BY_CJPEG, "padded"],
)
def test_unusual_sampling_factors_and_codings_decode_as_by_pillow(encoded: bytes) -> None:
    assert np.array_equal(decode(encoded), by_pillow(encoded))
    assert check_image(encoded, Conversion()).encoded == encoded


def test_kinds_are_found_whatever_the_sampling_factors() -> None:
    assert check_image(sampled(FOUR_TO_ONE, 0x14, 0x11, 0x11), Conversion()).kind == Kind(0)
    assert check_image(jpeg("L"), Conversion()).kind == Kind.GREY
    assert check_image(HARMLESS["YCCK"], Conversion()).kind == Kind.CMYK


def without(encoded: bytes, marker: bytes) -> bytes:
    at = encoded.index(marker, encoded.index(SCAN))
    return encoded[:at] + encoded[at + len(marker) :]


def without_second_scan(encoded: bytes) -> bytes:
    """The first scan of the AC coefficients of luminance; later ones refine it."""
    start = [match.start() for match in re.finditer(SCAN, encoded)][1]
    stop = re.compile(rb"\xff[\xc4\xda]").search(encoded, start + 2)
    assert stop
    return encoded[:start] + encoded[stop.start() :]


def flips(encoded: bytes) -> Iterator[tuple[bytes, str]]:
    """The JPEG with one bit of its data inverted, and what libjpeg says of it."""
    for at in range(encoded.index(SCAN) + 14, len(encoded) - 2, 13):
        damaged = encoded[:at] + bytes([encoded[at] ^ 0x10]) + encoded[at + 1 :]
        try:
            simplejpeg.decode_jpeg(damaged)
        except ValueError as error:
            yield damaged, str(error)


def is_refused(encoded: bytes) -> bool:
    try:
        decode(encoded)
    except DecodeError:
        return True
    return False


DAMAGED: dict[str, tuple[bytes, str]] = {
    "no EOI": (PLAIN[:-2], "Premature end of JPEG file"),
    "half": (PLAIN[: len(PLAIN) // 2], "Premature end of JPEG file"),
    "half, with EOI": (PLAIN[: len(PLAIN) // 2] + EOI, "premature end of data segment"),
    "half of a progressive JPEG, with EOI": (
        PROGRESSIVE[: len(PROGRESSIVE) // 2] + EOI,
        "premature end of data segment",
    ),
    "a byte cut out, behind an odd JFIF revision": (
        (lambda odd: odd[:900] + odd[1100:])(HARMLESS["JFIF 3.7"]),
        "premature end of data segment",
    ),
    "a restart marker missing": (without(RESTARTING, b"\xff\xd3"), "extraneous bytes before marker 0xd4"),
    "an interval missing": (
        RESTARTING.replace(RESTARTING[RESTARTING.index(b"\xff\xd2") : RESTARTING.index(b"\xff\xd4")], b"", 1),
        "found marker 0xd4 instead of RST2",
    ),
    "a scan missing": (without_second_scan(PROGRESSIVE), "Inconsistent progression sequence"),
    "bad arithmetic code": (
        (lambda data: data[:232] + b"\x17" + data[233:])(BY_CJPEG["arithmetic"]),
        "bad arithmetic code",
    ),
    "truncated, unusual sampling": (BY_CJPEG["2x1,1x1,2x1"][:300], "truncated"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_lost_pixels_are_damage(name: str) -> None:
    encoded, reason = DAMAGED[name]
    with pytest.raises(DecodeError, match=f"^damaged: .*{reason}"):
        decode(encoded)


def test_data_that_was_not_reached_is_told_from_padding() -> None:
    verdicts = []
    for _ in range(60):
        file = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
        unreached = (damaged for damaged, message in flips(file.getvalue()) if "before marker 0xd9" in message)
        if damaged := next(unreached, None):
            verdicts.append(is_refused(damaged))
    # By chance, one in four ends as an undamaged image does.
    assert verdicts.count(True) > len(verdicts) / 2 > 15


def test_every_other_warning_about_the_data_is_damage() -> None:
    found = [(damaged, message) for damaged, message in flips(PROGRESSIVE) if "marker 0xd9" not in message]
    assert any("bad Huffman code" in message for _, message in found)
    assert all(is_refused(damaged) for damaged, _ in found)


@pytest.mark.parametrize("progressive", [False, True])
def test_padding_is_accepted_however_the_data_ends(progressive: bool) -> None:
    rng = np.random.default_rng(3)
    for number in range(40):
        file = io.BytesIO()
        few = Image.fromarray(rng.integers(0, 256, (1 + number % 4, 5, 3), dtype=np.uint8))
        size = (int(rng.integers(8, 60)), int(rng.integers(8, 60)))
        few.resize(size).save(file, "JPEG", quality=80, progressive=progressive, subsampling=number % 3)
        padding = (bytes(9), b"\xff\0" * 9, rng.bytes(40).replace(b"\xff", b"\xff\0"))[number % 3]
        assert np.array_equal(decode(padded(file.getvalue(), padding)), decode(file.getvalue()))
