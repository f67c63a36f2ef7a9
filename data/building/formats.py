"""Which files are images: by their extension, and by their first bytes where the extension does not say."""

import zlib
from collections.abc import Callable
from typing import Literal

from data.images.signatures import SIGNATURE, compression, image_format
from data.tar import COMPRESSED_TAR_EXTENSIONS, UNREAD_TAR_EXTENSIONS

HEAD = 512
"""Bytes from the beginning of a file that tell whether it is an image, also one that is compressed with gzip."""

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
_UNREAD_IMAGES = (".heic", ".heif", ".avif", ".jp2", ".jxl")  # photographs: losing one is an error, not a remark
TAR_EXTENSIONS = (".tar", *COMPRESSED_TAR_EXTENSIONS, *UNREAD_TAR_EXTENSIONS)  # losing a class would be an error, too

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
    if not _begins_image(head()):
        raise NotTaken("not an image by its first bytes")
    return "image"


def without_tar_extension(name: str) -> str:
    """`n01440764` of `n01440764.tar.gz`."""
    return next(name[: -len(extension)] for extension in TAR_EXTENSIONS if name.lower().endswith(extension))


def _begins_image(head: bytes) -> bool:
    """Whether an image begins with `head`, also one that is compressed with gzip."""
    if compression(head) == "gzip":
        try:
            head = zlib.decompressobj(31).decompress(head, SIGNATURE)
        except zlib.error:
            return False
    return image_format(head) is not None


def _extension(lower: str) -> str:
    stem, dot, extension = lower.rpartition(".")
    return f".{extension}" if dot and stem else ""
