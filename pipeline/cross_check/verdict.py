"""Which ranks are wrong, where two of them computed different values of the same micro-batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Values = tuple[int, ...]
"""Checksums of one micro-batch that one rank computed."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A micro-batch whose values differ between two ranks, and what all ranks get when they compute it once more.

    With one rank, both are this one.
    """

    owner: int
    """The rank whose micro-batch it is."""
    owned: Values
    checker: int
    checked: Values
    again: Sequence[Values] = ()
    """By rank; empty with one rank."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is wrong, and in which values: by rank, positions among those that are compared."""

    accused: Mapping[int, tuple[int, ...]]
    suspects: Mapping[int, tuple[int, ...]]
    """Ranks of which some are wrong, and it cannot be told which."""
    too_many: bool = False
    """Whether that is because more than half of the ranks would be, which is no fault of machines."""


def verdict(disagreements: Sequence[Disagreement], world_size: int) -> Verdict:
    """The verdict on at least one disagreement.

    With three ranks or more, that of the values counts which most of them have: owner and checker as they first
    computed them, and each other rank as a witness. With two, a rank whose second computation differs from its first
    is wrong. One rank that differs from itself is.
    """
    accused: dict[int, tuple[int, ...]] = {}
    undecided: dict[int, tuple[int, ...]] = {}
    for one in disagreements:
        found = _accused_by(one, world_size)
        for rank, places in found.items():
            accused[rank] = tuple(sorted({*accused.get(rank, ()), *places}))
        if not found:
            undecided |= dict.fromkeys((one.owner, one.checker), _differing(one.owned, one.checked))
    if world_size > 1 and 2 * len(accused) > world_size:
        return Verdict({}, undecided | accused, too_many=True)
    # What a rank that is wrong for certain has to do with needs no other explanation.
    explained = {
        rank for one in disagreements for rank in (one.owner, one.checker) if {one.owner, one.checker} & set(accused)
    }
    return Verdict(accused, {rank: places for rank, places in undecided.items() if rank not in explained})


def _accused_by(one: Disagreement, world_size: int) -> dict[int, tuple[int, ...]]:
    """Ranks that are wrong, with the positions of the wrong values; empty if it cannot be told."""
    if world_size == 1:
        return {one.owner: _differing(one.owned, one.checked)}
    first = {one.owner: one.owned, one.checker: one.checked}
    if world_size == 2:
        return {
            rank: _differing(values, one.again[rank]) for rank, values in first.items() if values != one.again[rank]
        }
    votes = first | {rank: values for rank, values in enumerate(one.again) if rank not in first}
    (right, most), *others = Counter(votes.values()).most_common()
    if most == 1 or (others and others[0][1] == most):
        return {}
    return {rank: _differing(values, right) for rank, values in votes.items() if values != right}


def _differing(values: Values, others: Values) -> tuple[int, ...]:
    return tuple(place for place, (one, other) in enumerate(zip(values, others, strict=True)) if one != other)
