"""Names of classes for people, from a file such as ImageNet's `LOC_synset_mapping.txt`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, raise_if_passing
from data.files.regular_file import read_regular
from data.limits import CLASS_LIST_BYTES

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class DisplayNames:
    """Names for people of a list of classes."""

    names: tuple[str, ...]
    """In the order of the classes; a class that has none keeps its own."""
    without: tuple[str, ...]
    """Classes that the file does not name."""
    unknown: tuple[str, ...]
    """What the file names and is no class."""

    def remarks(self, file: str) -> list[str]:
        """What does not match, counted and named."""
        remarks = []
        if self.without:
            remarks.append(
                f"{file}: has no name for {len(self.without):,} of the {len(self.names):,} classes, which "
                f"{'keeps its' if len(self.without) == 1 else 'keep their'} own ({_first(self.without)})"
            )
        if self.unknown:
            verb = "names" if len(self.unknown) == 1 else "name"
            remarks.append(f"{file}: {len(self.unknown):,} of its lines {verb} no class ({_first(self.unknown)})")
        return remarks


def match_display_names(file: Path, classes: Sequence[str]) -> DisplayNames:
    """The names for people that `file` has for `classes`.

    Raises:
        DataError: as for `read_display_names`, or none of its lines names a class.
    """
    names = read_display_names(file)
    known = set(classes)
    unknown = tuple(name for name in names if name not in known)
    without = tuple(name for name in classes if name not in names)
    if len(unknown) == len(names):
        raise DataError(
            f"{file}: none of its {len(names):,} lines begins with the name of a class ({_first(unknown)} there, "
            f"{_first(tuple(classes))} in the model); lines must be as `n01440764 tench, Tinca tinca`"
        )
    return DisplayNames(tuple(names.get(name, name) for name in classes), without, unknown)


def read_display_names(file: Path) -> Mapping[str, str]:
    """Class -> name for people, of lines as `n01440764 tench, Tinca tinca`: a class, a space or tab, its name.

    In a line with a tab the class ends there, so that it may have spaces. Empty lines are skipped.

    Raises:
        DataError: no such file, not UTF-8, a line without a name, a class with two names, or no line at all.
    """
    try:
        text = read_regular(file, CLASS_LIST_BYTES).decode()
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise_if_passing(error)
        raise DataError(
            f"{file}: {error.strerror or error}; give a file with a class and its name on each line"
        ) from None
    names: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        parts = line.split("\t", 1) if "\t" in line else line.split(None, 1)
        if len(parts) < 2:
            raise DataError(
                f"{file}: line {number} is {line[:80]!r}; lines must be a class and its name, as "
                "`n01440764 tench, Tinca tinca`"
            )
        name, shown = parts[0].strip(), parts[1].strip()
        if names.setdefault(name, shown) != shown:
            raise DataError(f"{file}: line {number} gives the class {name[:80]!r} a second name; leave one of them")
    if not names:
        raise DataError(f"{file}: empty; give a file with a class and its name on each line")
    return names


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
