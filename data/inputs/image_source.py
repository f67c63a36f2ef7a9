"""Where images to classify come from, one after the other."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class UnreadableImage(ValueError):
    """An image that cannot be read; the message is the reason.

    Args:
        reason: why.
        may_pass: whether the same command may succeed later, as when a server does not answer.
    """

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An encoded image, and the labels that are stored with it."""

    content: bytes
    labels: tuple[int, ...] = ()
    """Positions in the class list of the source."""


class ImageSource(Protocol):
    """Images with random access; threads may share it."""

    classes: tuple[str, ...]
    """What the labels of the images are positions in; empty if they have none."""

    def __len__(self) -> int:
        """How many images there are."""

    def name(self, number: int) -> str:
        """What image `number` is called in messages, without signatures of web addresses."""

    def read(self, number: int) -> StoredImage:
        """Image `number`.

        Raises:
            UnreadableImage: it cannot be read.
        """

    def prepare(self, first: int, last: int) -> None:
        """Called before any of the images `first` .. `last` is read, in order: what is remote may be fetched."""

    def stop(self) -> None:
        """End every wait for an image."""

    def close(self) -> None:
        """Release what the source holds."""


class JoinedSources:
    """The images of several sources, one source after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = tuple(sources)
        self._ends: list[int] = []
        for source in sources:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(source))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, number: int) -> tuple[ImageSource, int]:
        """The source of image `number`, and its number there."""
        position = bisect_right(self._ends, number)
        source = self.sources[position]
        return source, number - (self._ends[position] - len(source))

    def prepare(self, first: int, last: int) -> None:
        """See `ImageSource.prepare`."""
        for source, end in zip(self.sources, self._ends, strict=True):
            start = end - len(source)
            if first < end and last > start:
                source.prepare(max(first, start) - start, min(last, end) - start)

    def stop(self) -> None:
        """See `ImageSource.stop`."""
        for source in self.sources:
            source.stop()

    def close(self) -> None:
        """See `ImageSource.close`."""
        for source in self.sources:
            source.close()
