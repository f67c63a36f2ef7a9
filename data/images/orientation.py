"""The orientation in which a camera was held, as it is noted in a JPEG."""

from PIL import Image

from data.images.jpeg import segments

_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_APP1, _START_OF_SCAN = 0xE1, 0xDA


def is_turned(encoded: bytes) -> bool:
    """Whether the EXIF data of a JPEG say that its pixels are to be turned or mirrored for viewing, which `decode` does
    not do. False for other formats, and for EXIF data that cannot be read."""
    if encoded[:2] != b"\xff\xd8":
        return False
    for marker, start, stop in segments(encoded):
        if marker == _START_OF_SCAN:
            break
        if marker == _APP1 and encoded[start + 4 : start + 10] == _EXIF:
            exif = Image.Exif()
            try:
                exif.load(encoded[start + 4 : stop])
                return exif.get(_ORIENTATION, 1) in range(2, 9)
            except Exception:  # Pillow raises anything on damaged bytes
                return False
    return False
