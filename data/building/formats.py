"""Which files are images: by their extension, and by their first bytes where the extension does not say."""

import zlib
from collections.abc import Callable
from typing import Literal

HEAD = 512
"""Bytes from the beginning of a file that `image_format` looks at."""
GZIP = b"\x1f\x8b"

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
_UNREAD_IMAGES = (".heic", ".heif", ".avif", ".jp2", ".jxl")  # photographs: losing one is an error, not a remark
_UNREAD_TARS = (".tar.zst", ".tzst", ".tar.lz4", ".tar.lz", ".tar.z")  # losing a class would be an error, too
TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", *_UNREAD_TARS)

_OTHER_EXTENSIONS = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".md", ".rst", ".html", ".htm",
    ".css", ".js", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".py", ".pyc", ".ipynb", ".sh", ".bat", ".m",
    ".c", ".h", ".log", ".ini", ".cfg", ".conf", ".db", ".sqlite", ".mat", ".npy", ".npz", ".pkl", ".pth", ".pt",
    ".h5", ".hdf5", ".lmdb", ".parquet", ".arrow", ".tfrecord", ".idx", ".mp3", ".wav", ".mp4", ".avi", ".mov",
    ".mkv", ".webm", ".mpg", ".md5", ".sha1", ".sha256", ".url", ".lnk", ".cls", ".torrent", ".zip", ".rar", ".7z",
    ".zst", ".lz4", ".svg", ".psd", ".ai", ".eps", ".nef", ".cr2", ".cr3", ".arw", ".dng", ".orf", ".rw2", ".raf",
}  # fmt: skip

Use = Literal["image", "tar"]


class NotTaken(Exception):
    """A file is neither an image nor a tar; the message is the reason."""


def use_of(name: str, head: Callable[[], bytes]) -> Use:
    """What the file `name` is to a build.

    Args:
        head: reads the first `HEAD` bytes of the file; called only if the extension does not say what it is.

    Raises:
        NotTaken: nothing.
    """
    lower = name.lower()
    extension = _extension(lower)
    if extension in IMAGE_EXTENSIONS or extension in _UNREAD_IMAGES:
        return "image"
    if lower.endswith(TAR_EXTENSIONS):
        return "tar"
    if extension in _OTHER_EXTENSIONS:
        raise NotTaken(f"not an image ({extension})")
    if image_format(head()) is None:
        raise NotTaken("not an image by its first bytes")
    return "image"


def without_tar_extension(name: str) -> str:
    """`n01440764` of `n01440764.tar.gz`."""
    return next(name[: -len(extension)] for extension in TAR_EXTENSIONS if name.lower().endswith(extension))


def image_format(head: bytes) -> str | None:
    """The image format that a file begins with, also if it is compressed with gzip; None if it is no image."""
    if head.startswith(GZIP):
        try:
            head = zlib.decompressobj(31).decompress(head, 64)
        except zlib.error:
            return None
    for start, name in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF87a", "GIF"),
        (b"GIF89a", "GIF"),
    ):
        if head.startswith(start):
            return name
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] in (b"P4", b"P5", b"P6") and head[2:3].isspace() and (head[3:4].isdigit() or head[3:4] == b"#"):
        return "PPM"
    # Two letters are not enough: the reserved bytes are zero, and the second header has one of few sizes.
    if head[:2] == b"BM" and head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        return "HEIF"
    return None


_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


def _extension(lower: str) -> str:
    stem, dot, extension = lower.rpartition(".")
    return f".{extension}" if dot and stem else ""
