"""A finding of a check: something is in order, doubtful, or would fail; and what to do about it."""

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
    """What a check found, and the fix if there is something to fix."""

    level: Level
    where: str
    """Name of a stage; empty if the finding concerns no single stage."""
    what: str
    fix: str = ""

    @property
    def line(self) -> str:
        """Everything but the level, on one line."""
        return "".join([f"stage {self.where}: " if self.where else "", self.what, f"; {self.fix}" if self.fix else ""])


class Findings(list[Finding]):
    """Findings about one stage."""

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
    def capture(self) -> Iterator[None]:
        """Turn an error raised in the body into a finding."""
        try:
            yield
        except (ConfigError, DataError, StorageDown) as error:
            self.append(finding_of_error(self.where, error))


def finding_of_error(where: str, error: Exception) -> Finding:
    """Split the message of an error, which reads `what is wrong; the fix`, into a finding."""
    message = str(error).removeprefix(f"stage {where}: ")
    # Lists of changes stand on lines of their own, with the fix on the last one; a semicolon in parentheses splits
    # nothing.
    what, _, fix = message.rpartition("\n") if "\n" in message else (message, "", "")
    if not fix:
        parts = re.split(r"; (?![^(]*\))", message, maxsplit=1)
        what, fix = parts if len(parts) == 2 else (message, "")
    if isinstance(error, StorageDown):
        fix = f"{fix}; try again later" if fix else "try again later"
    return Finding("error", where, what, fix)
