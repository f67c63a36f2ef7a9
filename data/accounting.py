"""What became of every entry of a source: found = taken + left out, each reason with its count and first names."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from data.errors import DataError

REPORT_NAME = "report.json"
"""The report of a build or of indexing, kept beside `index.json`."""
FIRST_NAMES = 3
"""How many of many names are shown or kept."""


@dataclass(slots=True)
class LeftOut:
    """Entries that were left out for one reason, and the names of the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, names: Iterable[str], count: int) -> None:
        """Count `count` more entries, of which `names` are the first."""
        self.count += count
        for name in names:
            if len(self.first) == FIRST_NAMES:
                break
            self.first.append(name)


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that changes what the dataset means, and the option that decides it.

    Args:
        kind: identifies it for programs, such as `multi_label`.
        text: a sentence for people, with the option.
    """

    kind: str
    text: str


@dataclass(slots=True)
class Accounting:
    """The entries of a source, counted when they are listed and again when it is decided what becomes of each.

    Args:
        unit: what the entries are, in the plural: `files`, `members` or `samples`.
        found: the number of entries that were listed.
        taken: use of an entry, such as `images` or `labels` -> the number of entries.
        left_out: reason -> the entries that were left out for it.
        remarks: what changes the meaning of the dataset.
    """

    unit: str
    found: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def take(self, use: str, count: int = 1) -> None:
        """Count entries that become part of the dataset."""
        self.taken[use] = self.taken.get(use, 0) + count

    def leave_out(self, reason: str, *names: str, count: int | None = None) -> None:
        """Count entries that do not; `count` defaults to the number of `names`, otherwise these are the first."""
        self.left_out.setdefault(reason, LeftOut()).add(names, len(names) if count is None else count)

    def remark(self, kind: str, text: str) -> None:
        """Add a remark, once for each kind."""
        if all(remark.kind != kind for remark in self.remarks):
            self.remarks.append(Remark(kind, text))

    def add(self, other: "Accounting") -> None:
        """Add the entries of another part of the source, which comes after those already counted."""
        self.found += other.found
        for use, count in other.taken.items():
            self.take(use, count)
        for reason, entries in other.left_out.items():
            self.leave_out(reason, *entries.first, count=entries.count)
        for remark in other.remarks:
            self.remark(remark.kind, remark.text)

    def check(self) -> None:
        """Raise DataError if an entry is not accounted for, which is a defect of this program."""
        taken, left_out = sum(self.taken.values()), sum(entries.count for entries in self.left_out.values())
        if self.found != taken + left_out:
            raise DataError(
                f"{self.found:,} {self.unit} found, {taken:,} taken and {left_out:,} left out, which does not add up; "
                "this is a defect of the program: please report it"
            )


def listed(names: Sequence[str], separator: str = ", ", count: int | None = None) -> str:
    """The first of some names, as in `a, b, c, ...`.

    Args:
        names: of which the first few are shown.
        separator: between two.
        count: how many there are; defaults to the number of `names`.
    """
    shown = names[:FIRST_NAMES]
    return separator.join([*shown, "..."] if len(shown) < (len(names) if count is None else count) else shown)


def lines(accounting: Accounting) -> Iterator[str]:
    """As `table`, but one line for all entries if none is left out."""
    if accounting.left_out:
        yield from table(accounting)
    else:
        uses = ", ".join(f"{count:,} {use}" for use, count in accounting.taken.items() if count)
        yield f"{accounting.found:,} {accounting.unit} found, all of them taken: {uses}"
        yield from (remark.text for remark in accounting.remarks)


def table(accounting: Accounting) -> Iterator[str]:
    """The lines that people read: one for what was found, one per use and reason, and one per remark."""
    uses: Mapping[str, int] = accounting.taken
    counts = [accounting.found, *uses.values(), *(entries.count for entries in accounting.left_out.values())]
    width = max(len(f"{count:,}") for count in counts)
    yield f"{accounting.found:>{width},} {accounting.unit} found"
    for use, count in uses.items():
        yield f"{count:>{width},} taken: {use}"
    for reason, entries in accounting.left_out.items():
        names = listed(entries.first, count=entries.count)
        yield f"{entries.count:>{width},} left out: {reason}{f' ({names})' if names else ''}"
    for remark in accounting.remarks:
        yield remark.text
