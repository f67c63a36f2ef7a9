"""Numbers with nouns."""

from data.text.counted import counted


def test_one_is_singular_and_all_other_numbers_are_plural() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2, 1200)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,200 shards",
    ]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
