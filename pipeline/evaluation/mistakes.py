"""The most confident mistakes: the samples whose wrong prediction has the highest score, as the model sees them."""

import base64
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from data.images.contact_sheet import enlarged, thumbnail
from data.images.decode import Pixels
from data.stream import SampleOrigin
from pipeline.ranks.distributed import Ranks


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """A sample whose best class is none of its labels. The order is from the least confident one to the most."""

    score: float
    """Of the prediction, 0 to 1."""
    reversed_id: int
    """Minus the sample's id: of equal scores, the earlier sample is the greater mistake."""
    shard: str = field(compare=False)
    key: str = field(compare=False)
    labels: tuple[int, ...] = field(compare=False)
    predicted: int = field(compare=False)
    pixels: Pixels = field(compare=False, repr=False)
    """(height, width, 3) uint8, the crop that the model saw, as a thumbnail."""


class MostConfidentMistakes:
    """Keeps the `count` most confident mistakes of one rank."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[Mistake] = []

    @property
    def threshold(self) -> float:
        """Mistakes with a lower score are not kept."""
        if self._count == 0:
            return float("inf")
        return self._kept[0].score if len(self._kept) == self._count else -1.0

    def add(self, score: float, origin: SampleOrigin, labels: Iterable[int], predicted: int, pixels: Pixels) -> None:
        """Keep a mistake if it is one of the most confident so far; `pixels` (S, S, 3) are copied."""
        if score < self.threshold:
            return
        small = np.array(thumbnail(enlarged(pixels)))
        mistake = Mistake(score, -origin.id, origin.shard, origin.key, tuple(labels), predicted, small)
        if len(self._kept) < self._count:
            heapq.heappush(self._kept, mistake)
        else:
            heapq.heappushpop(self._kept, mistake)

    def result(self, ranks: Ranks) -> list[Mistake]:
        """The most confident mistakes over all ranks, the most confident first; all ranks call this."""
        own = sorted(self._kept, reverse=True)
        if ranks.world_size == 1:
            return own
        # First where they are, then the pixels of those that are among the first of all.
        places = [
            (score, reversed_id)
            for text in ranks.gather_texts(json.dumps([(one.score, one.reversed_id) for one in own]))
            for score, reversed_id in json.loads(text)
        ]
        chosen = set(sorted(places, reverse=True)[: self._count])
        texts = ranks.gather_texts(json.dumps([_packed(one) for one in own if (one.score, one.reversed_id) in chosen]))
        return sorted((_unpacked(item) for text in texts for item in json.loads(text)), reverse=True)


def _packed(mistake: Mistake) -> list[object]:
    pixels = mistake.pixels
    return [
        mistake.score,
        mistake.reversed_id,
        mistake.shard,
        mistake.key,
        mistake.labels,
        mistake.predicted,
        pixels.shape,
        base64.b64encode(pixels.tobytes()).decode(),
    ]


def _unpacked(item: list[object]) -> Mistake:
    score, reversed_id, shard, key, labels, predicted, shape, content = item
    pixels = np.frombuffer(base64.b64decode(str(content)), np.uint8).reshape(shape)  # type: ignore[call-overload]
    return Mistake(score, reversed_id, shard, key, tuple(labels), predicted, pixels)  # type: ignore[arg-type]
