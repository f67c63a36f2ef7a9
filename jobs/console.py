"""Output for people: one console, one style of table."""

import json
import sys
from collections.abc import Collection
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.monitoring.bounded_output import bounded_text
from pipeline.monitoring.console import PrintableConsole, styled_text

PIPE_WIDTH = 200
"""Columns: a pipe has no width of its own to keep to."""


def make_console(*, bounded: bool = False) -> Console:
    """A console on standard output, as wide as the terminal, or 200 columns on a pipe or file.

    For commands that train, it is `bounded`: a reader that stops reading, or goes away, does not stop them.
    """
    file = bounded_text(sys.stdout.fileno()) if bounded else None
    return PrintableConsole(file=file, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_line(console: Console, *parts: str | tuple[str, str]) -> None:
    """Print a message, unwrapped. Its parts are strings, or strings with a style."""
    console.print(styled_text(*parts), soft_wrap=True)


def print_warning(console: Console, text: str) -> None:
    """Print `text`, unwrapped, as a warning."""
    print_line(console, ("warning: ", "yellow"), text)


def print_json(value: Any, *, indent: int | None = 1) -> None:
    """Print `value` as JSON, on one line if `indent` is None; in it, all that is not ASCII is escaped."""
    print(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"), flush=True)


def make_table(*headings: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """An empty table with these columns; those in `right` are aligned to the right. Long cells wrap."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        title=None if title is None else styled_text((title, "bold")),
        title_justify="left",
    )
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table
