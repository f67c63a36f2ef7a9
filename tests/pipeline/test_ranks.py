"""What ranks tell each other."""

from tests.pipeline.checkpoints.small import together


def test_every_rank_gets_the_texts_of_all_in_their_order() -> None:
    said = ["zero", "", "zwölf £", "{}"]
    assert together(4, lambda ranks: ranks.gather_texts(said[ranks.rank])) == [said] * 4
    assert together(2, lambda ranks: ranks.gather_texts("")) == [["", ""]] * 2
