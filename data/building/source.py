"""Sources of images for shards, and their division into batches for workers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from data.accounting import Accounting
from data.index import LabelFormat

UNKNOWN_SIZE = 2**17
"""Bytes assumed for a file whose size would cost a request."""


@dataclass(frozen=True, slots=True)
class BrokenInput:
    """An unreadable image, or the lost part of a damaged tar, and the reason."""

    name: str
    reason: str
    is_tar: bool = False
    classes: tuple[str, ...] = ()
    """Of the image, if known."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to be read: a file, or the bytes `start` .. `stop` of one."""

    name: str
    classes: tuple[str, ...]
    location: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class ClassTar:
    """A tar with the images of one class, to be read: a file, or the bytes `start` .. `stop` of one."""

    path: str
    """In the source."""
    class_name: str
    prefix: str
    """Of the names of its images."""
    location: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """A shard of an indexed WebDataset, to be read."""

    location: str
    number: int
    """Its position in the index."""
    name: str
    samples: int
    image_fields: tuple[str, ...]
    label: LabelFormat
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceIndex:
    """The index of a source: the classes of its images are positions in its class list, as text."""

    location: str
    digest: str


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image that has been read."""

    name: str
    classes: tuple[str, ...]
    encoded: bytes


class SourceItem(NamedTuple):
    """What a source yields: something with images, its bytes, and its share of the source."""

    content: ImageFile | ClassTar | IndexedShard | SourceImage | BrokenInput
    bytes: int
    share: float


@dataclass(frozen=True)
class Source:
    """Images in an order that is reproducible.

    What `accounting` counts as found is either left out or yielded by `items`, one entry each. What becomes of those is
    known when they have been read.
    """

    location: str
    items: Callable[[], Iterator[SourceItem]]
    accounting: Accounting
    """Of all entries; complete when `items` is exhausted."""
    bytes: int | None = None
    """Of all images, approximately; None if unknown."""
    divisible: bool = True
    """Whether a part can be read without reading the rest."""
    index: SourceIndex | None = None
    """Its index, if it is a WebDataset."""


@dataclass
class ImageBatch:
    """Consecutive items of a source, as many as a worker reads at a time."""

    contents: list[ImageFile | ClassTar | IndexedShard | SourceImage | BrokenInput] = field(default_factory=list)
    bytes: int = 0
    share: float = 0.0

    def digest(self) -> str:
        """Of the contents of the batch: equal as long as the source does not change."""
        digest = hashlib.blake2b(digest_size=8)
        for content in self.contents:
            if isinstance(content, SourceImage):
                known = repr((content.name, content.classes, len(content.encoded)))
            else:
                known = repr(content if isinstance(content, BrokenInput) else replace(content, location=""))
            digest.update(known.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def batches(items: Iterable[SourceItem], max_bytes: int) -> Iterator[ImageBatch]:
    """Batches of `max_bytes`; the first ones are smaller, so that even a small source occupies several processes."""
    batch, number = ImageBatch(), 0
    for item in items:
        batch.contents.append(item.content)
        batch.bytes += item.bytes
        batch.share += item.share
        if batch.bytes >= min(max_bytes, (max_bytes // 16) << min(number // 8, 10)):
            yield batch
            batch, number = ImageBatch(), number + 1
    if batch.contents:
        yield batch
