"""Images to classify, read and decoded in threads and delivered in their order as batches of one shape."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.images.augment import EvaluationTransform
from data.images.contact_sheet import thumbnail
from data.images.decode import DecodeError, Pixels, decode
from data.images.orientation import is_turned
from data.inputs.image_source import ImageSource, JoinedSources, UnreadableImage
from data.ordered_results import results_in_order


@dataclass(frozen=True, slots=True, eq=False)
class InputImage:
    """An image of a batch, or why there is none."""

    name: str
    source: ImageSource
    labels: tuple[int, ...] = ()
    """Positions in the class list of its source."""
    problem: str = ""
    """Why it cannot be used; empty if it can."""
    may_pass: bool = False
    """Whether the problem may be gone later."""
    turned: bool = False
    """Whether its EXIF data say that it is to be turned for viewing. It is not, as in training."""
    thumbnail: Pixels | None = None


@dataclass(frozen=True, slots=True, eq=False)
class InputBatch:
    """Images of one forward pass."""

    pixels: Pixels
    """(batch, S, S, 3) uint8; rows of images that cannot be used, and those behind the last image, are black."""
    images: list[InputImage]
    """At most `batch`, in order."""


def image_batches(
    sources: JoinedSources,
    transform: EvaluationTransform,
    batch: int,
    workers: int,
    thumbnails: int = 0,
    thumbnail_size: int = 0,
) -> Iterator[InputBatch]:
    """All images of `sources` in batches of `batch`, decoded and transformed as for an evaluation.

    The first `thumbnails` of them that can be used also come as pictures of at most `thumbnail_size` pixels a side.
    """

    def load(first: int, last: int) -> InputBatch:
        pixels = np.zeros((batch, transform.size, transform.size, 3), np.uint8)
        size = thumbnail_size if first < thumbnails else 0
        images = [
            _load(*sources.place(number), transform, pixels[number - first], size) for number in range(first, last)
        ]
        return InputBatch(pixels, images)

    def tasks() -> Iterator[Callable[[], InputBatch]]:
        for first in range(0, len(sources), batch):
            last = min(first + batch, len(sources))
            sources.prepare(max(0, first - 2 * workers * batch), last)  # earlier batches may still be read
            yield partial(load, first, last)

    return results_in_order(tasks(), workers, sources.stop)


def _load(source: ImageSource, number: int, transform: EvaluationTransform, row: Pixels, size: int) -> InputImage:
    """Read an image and write its pixels to `row`."""
    try:
        stored = source.read(number)
        pixels = decode(stored.content)
    except UnreadableImage as error:
        return InputImage(source.name(number), source, problem=str(error), may_pass=error.may_pass)
    except DecodeError as error:
        return InputImage(source.name(number), source, problem=error.what)
    row[:] = transform(pixels)
    return InputImage(
        source.name(number),
        source,
        stored.labels,
        turned=is_turned(stored.content),
        thumbnail=thumbnail(pixels, size) if size else None,
    )
