"""Who is wrong: with three ranks and more the majority, with two the one that differs from itself, alone the one rank."""

import pytest

from pipeline.cross_check.verdict import Disagreement, Values, Verdict, verdict

RIGHT: Values = (7, 8, 9)
WRONG: Values = (7, 0, 9)
OTHER: Values = (1, 8, 1)
BOTH = (0, 1, 2)
"""Where WRONG and OTHER differ."""


def of(owner: int, owned: Values, checked: Values, *again: Values) -> Disagreement:
    return Disagreement(owner, owned, (owner - 1) % max(1, len(again)), checked, again)


ONE_RANK = [
    ([of(0, RIGHT, WRONG)], Verdict({0: (1,)}, {})),
]
TWO_RANKS = [
    # The fault was in the first computation of the owner, of the checker, of both.
    ([of(1, WRONG, RIGHT, RIGHT, RIGHT)], Verdict({1: (1,)}, {})),
    ([of(1, RIGHT, WRONG, RIGHT, RIGHT)], Verdict({0: (1,)}, {})),
    ([of(1, WRONG, OTHER, RIGHT, RIGHT)], Verdict({}, {0: (0, 2), 1: (1,)}, too_many=True)),
    # It repeats: the other rank cannot say more than that it has something else.
    ([of(1, WRONG, RIGHT, RIGHT, WRONG)], Verdict({}, {0: (1,), 1: (1,)})),
    ([of(0, RIGHT, WRONG, RIGHT, WRONG), of(1, WRONG, RIGHT, RIGHT, WRONG)], Verdict({}, {0: (1,), 1: (1,)})),
    # It repeats, and is another one each time.
    ([of(1, WRONG, RIGHT, RIGHT, OTHER)], Verdict({1: BOTH}, {})),
    # One micro-batch can be decided, and explains the other.
    ([of(0, RIGHT, WRONG, RIGHT, WRONG), of(1, WRONG, RIGHT, RIGHT, OTHER)], Verdict({1: BOTH}, {})),
]
MORE_RANKS = [
    # Owner and checker count as they first computed it, and the third rank decides.
    ([of(1, WRONG, RIGHT, RIGHT, RIGHT, RIGHT)], Verdict({1: (1,)}, {})),
    ([of(1, RIGHT, WRONG, RIGHT, RIGHT, RIGHT)], Verdict({0: (1,)}, {})),
    ([of(1, WRONG, RIGHT, RIGHT, WRONG, RIGHT)], Verdict({1: (1,)}, {})),
    # A rank that is always wrong differs as the owner and as the checker.
    (
        [of(1, WRONG, RIGHT, RIGHT, WRONG, RIGHT), of(2, RIGHT, OTHER, RIGHT, OTHER, RIGHT)],
        Verdict({1: BOTH}, {}),
    ),
    # All three differ.
    ([of(1, WRONG, RIGHT, RIGHT, WRONG, OTHER)], Verdict({}, {0: (1,), 1: (1,)})),
    # Of four, two are as many as the other two.
    ([of(1, WRONG, RIGHT, RIGHT, WRONG, RIGHT, WRONG)], Verdict({}, {0: (1,), 1: (1,)})),
    # A witness is wrong as well, and outvoted.
    ([of(1, WRONG, RIGHT, RIGHT, WRONG, RIGHT, RIGHT, OTHER)], Verdict({1: (1,), 4: (0, 2)}, {})),
    # Two of five are wrong, and each is in two disagreements.
    (
        [
            of(1, WRONG, RIGHT, *5 * [RIGHT]),
            of(2, RIGHT, WRONG, *5 * [RIGHT]),
            of(3, OTHER, RIGHT, *5 * [RIGHT]),
            of(4, RIGHT, OTHER, *5 * [RIGHT]),
        ],
        Verdict({1: (1,), 3: (0, 2)}, {}),
    ),
    # Every owner differs from the rest: that is the software.
    (
        [of(owner, WRONG, RIGHT, *3 * [RIGHT]) for owner in range(3)],
        Verdict({}, {0: (1,), 1: (1,), 2: (1,)}, too_many=True),
    ),
    # What cannot be decided stays beside what can.
    (
        [of(1, WRONG, RIGHT, *6 * [RIGHT]), of(4, WRONG, OTHER, RIGHT, RIGHT, WRONG, OTHER, WRONG, OTHER)],
        Verdict({1: (1,)}, {3: BOTH, 4: BOTH}),
    ),
]


@pytest.mark.parametrize(
    ("world_size", "disagreements", "expected"),
    [
        *((1, *row) for row in ONE_RANK),
        *((2, *row) for row in TWO_RANKS),
        *((len(disagreements[0].again), disagreements, expected) for disagreements, expected in MORE_RANKS),
    ],
)
def test_the_verdict_names_who_is_wrong_and_in_what(
    world_size: int, disagreements: list[Disagreement], expected: Verdict
) -> None:
    assert verdict(disagreements, world_size) == expected
