"""Exchanges of texts between ranks."""

from tests.pipeline.checkpoints.small import together


def test_every_rank_gets_the_texts_of_all_in_their_order() -> None:
    texts = ["zero", "", "zwölf £", "{}"]
    assert together(4, lambda ranks: ranks.gather_texts(texts[ranks.rank])) == [texts] * 4
    assert together(2, lambda ranks: ranks.gather_texts("")) == [["", ""]] * 2
