"""Images that are to become shards: what a source yields, and batches of it for workers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
UNKNOWN_SIZE = 2**17
"""Bytes that a file counts with where its size is not known without asking for each."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An image that cannot be read, or the part of a tar that is lost, and why."""

    name: str
    reason: str
    is_tar: bool = False


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is still to be read: a file, or the bytes `start` .. `stop` of one."""

    name: str
    classes: tuple[str, ...]
    location: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class ClassTar:
    """A tar with the images of one class, still to be read: a file, or the bytes `start` .. `stop` of one."""

    class_name: str
    location: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Image:
    """An image as read."""

    name: str
    classes: tuple[str, ...]
    encoded: bytes


@dataclass(frozen=True, slots=True)
class Item:
    """What a source yields: something with images, its bytes, and its share of the source."""

    content: ImageFile | ClassTar | Image | Broken
    bytes: int
    share: float


@dataclass(frozen=True)
class Source:
    """Images in an order that is the same on every listing."""

    location: str
    items: Callable[[], Iterator[Item]]
    bytes: int | None = None
    """Of all images, about; None where that is not known."""
    divisible: bool = True
    """Whether several processes can each read a part without reading the rest."""


@dataclass
class ImageBatch:
    """Neighbours in a source, as much as one worker takes at a time."""

    contents: list[ImageFile | ClassTar | Image | Broken] = field(default_factory=list)
    bytes: int = 0
    share: float = 0.0

    def digest(self) -> str:
        """Of what the batch consists of: equal as long as the source does not change."""
        digest = hashlib.blake2b(digest_size=8)
        for content in self.contents:
            if isinstance(content, Image):
                known = repr((content.name, content.classes, len(content.encoded)))
            else:
                known = repr(content if isinstance(content, Broken) else replace(content, location=""))
            digest.update(known.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def batches(items: Iterable[Item], most: int) -> Iterator[ImageBatch]:
    """Batches of `most` bytes; the first ones are smaller, so that a small source, too, occupies several processes."""
    batch, number = ImageBatch(), 0
    for item in items:
        batch.contents.append(item.content)
        batch.bytes += item.bytes
        batch.share += item.share
        if batch.bytes >= min(most, (most // 16) << min(number // 8, 10)):
            yield batch
            batch, number = ImageBatch(), number + 1
    if batch.contents:
        yield batch


def is_image(name: str) -> bool:
    """Whether a file of this name should be an image."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
