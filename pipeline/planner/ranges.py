"""Figures with what they may be at least and at most."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate, and its ends; the three are equal for what is counted or was measured."""

    value: float
    least: float
    most: float

    @classmethod
    def exactly(cls, value: float) -> "Range":
        """A figure without a range."""
        return cls(value, value, value)

    @property
    def is_exact(self) -> bool:
        """Whether its ends are equal."""
        return self.least == self.most

    def __add__(self, other: "Range") -> "Range":
        return Range(self.value + other.value, self.least + other.least, self.most + other.most)

    def __mul__(self, factor: float) -> "Range":
        return Range(self.value * factor, self.least * factor, self.most * factor)

    def dividing(self, number: float) -> "Range":
        """`number` divided by this, as a rate by the seconds that something takes; the ends change places."""
        return Range(number / self.value, number / self.most, number / self.least)

    def beyond(self, other: "Range") -> "Range":
        """What of this is left when `other` hides a part of it, at least 0."""
        return Range(
            max(0.0, self.value - other.value), max(0.0, self.least - other.most), max(0.0, self.most - other.least)
        )

    def at_least(self, other: "Range") -> "Range":
        """The larger of both, end by end."""
        return Range(max(self.value, other.value), max(self.least, other.least), max(self.most, other.most))


NOTHING = Range.exactly(0.0)
