"""The first bytes of files: what images are of, and what files are compressed with."""

_JP2, _JXL = b"\0\0\0\x0cjP  ", b"\0\0\0\x0cJXL "
_IMAGES = (
    (b"\xff\xd8", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"\xff\x0a", "JPEG XL"), (_JXL, "JPEG XL"),
    (_JP2, "JPEG 2000"),
)  # fmt: skip
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"), (b"LZIP", "lzip"), (b"\x1f\x9d", "compress"),
)  # fmt: skip

SIGNATURE = 32
"""Bytes from the beginning of a file that tell what it is."""


def image_format(head: bytes) -> str | None:
    """The format of an image that begins with `head`, such as `JPEG` or `HEIC`; None if it is none that is known."""
    for start, name in _IMAGES:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] in (b"P4", b"P5", b"P6") and head[2:3].isspace() and (head[3:4].isdigit() or head[3:4] == b"#"):
        return "PPM"
    # Two letters are not enough: the reserved bytes are zero, and the second header has one of few sizes.
    if head[:2] == b"BM" and head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return _BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None


def compression(head: bytes) -> str | None:
    """What a file that begins with `head` is compressed with, such as `gzip`; None if it is not."""
    return next((name for start, name in _COMPRESSIONS if head.startswith(start)), None)
