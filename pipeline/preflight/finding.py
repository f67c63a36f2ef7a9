"""A line of what was found: all is well, something is doubtful, or it would fail; and what to do about it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from data.errors import DataError, StorageDown
from pipeline.errors import ConfigError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; `where` is the name of a stage, or empty."""

    level: Level
    where: str
    what: str
    fix: str = ""

    @property
    def line(self) -> str:
        """All of it but the level."""
        return "".join([f"stage {self.where}: " if self.where else "", self.what, f"; {self.fix}" if self.fix else ""])


class Findings(list[Finding]):
    """Findings on one stage."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def ok(self, what: str) -> None:
        self.append(Finding("ok", self.where, what))

    def warning(self, what: str, fix: str) -> None:
        self.append(Finding("warning", self.where, what, fix))

    def error(self, what: str, fix: str) -> None:
        self.append(Finding("error", self.where, what, fix))

    @contextmanager
    def told(self) -> Iterator[None]:
        """What is refused inside becomes a finding."""
        try:
            yield
        except (ConfigError, DataError, StorageDown) as error:
            self.append(refusal(self.where, error))


def refusal(where: str, error: Exception) -> Finding:
    """What an error says to a person, who is told by it what is wrong and, behind a semicolon, the fix."""
    message = str(error).removeprefix(f"stage {where}: ")
    # Lists of changes stand on lines of their own, the fix on the last; what is in brackets belongs to its word.
    what, _, fix = message.rpartition("\n") if "\n" in message else (message, "", "")
    if not fix:
        parts = re.split(r"; (?![^(]*\))", message, maxsplit=1)
        what, fix = parts if len(parts) == 2 else (message, "")
    if isinstance(error, StorageDown):
        fix = f"{fix}; try again later" if fix else "try again later"
    return Finding("error", where, what, fix)
