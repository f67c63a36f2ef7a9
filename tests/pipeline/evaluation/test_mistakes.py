"""Which mistakes are kept, and that ranks agree on them."""

import numpy as np

from data.images.contact_sheet import CELL
from data.stream import SampleOrigin
from pipeline.evaluation.mistakes import Mistake, MostConfidentMistakes
from pipeline.ranks.distributed import Ranks
from tests.pipeline.checkpoints.small import ALONE, together

SCORES = [0.5, 0.9, 0.9, 0.2, 0.7, 0.9, 0.1, 0.6]


def kept(count: int, ranks: Ranks = ALONE) -> list[Mistake]:
    mistakes = MostConfidentMistakes(count)
    for number in range(ranks.rank, len(SCORES), ranks.world_size):
        pixels = np.full((8, 8, 3), number, np.uint8)
        mistakes.add(SCORES[number], SampleOrigin(0, number, "s.tar", f"k\udce9{number}"), (1, 2), 3, pixels)
    return mistakes.result(ranks)


def test_the_most_confident_ones_are_kept_and_of_equal_ones_the_earlier() -> None:
    assert [one.key for one in kept(4)] == ["k\udce91", "k\udce92", "k\udce95", "k\udce94"]
    assert [one.key for one in kept(2)] == ["k\udce91", "k\udce92"]
    assert kept(0) == []
    assert len(kept(99)) == len(SCORES)


def test_ranks_agree_on_them_with_their_pixels() -> None:
    for found in together(3, lambda ranks: kept(4, ranks)):
        for one, other in zip(found, kept(4), strict=True):
            assert (one, one.key, one.shard, one.labels, one.predicted) == (other, other.key, "s.tar", (1, 2), 3)
            assert np.array_equal(one.pixels, other.pixels)


def test_small_images_are_enlarged_to_a_cell() -> None:
    assert kept(1)[0].pixels.shape == (CELL, CELL, 3)
