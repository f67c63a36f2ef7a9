"""A console that shows text as it is: nothing in it is markup, and nothing in it reaches the terminal unescaped."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from data.text.printable import printable, printable_message, unescaped


class PrintableConsole(Console):
    """A console, by default on standard output. Only styles of the program colour what it shows.

    Strings are escaped before they are laid out, whoever prints them; so is `styled_text`. Other objects of rich are
    escaped as they are written.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None, width: int | None = None) -> None:
        file = file or unescaped(sys.stderr if stderr else sys.stdout)
        super().__init__(file=file, width=width, markup=False, emoji=False, highlight=False)

    @property
    def size(self) -> ConsoleDimensions:
        """That of the terminal it writes to; rich knows only the standard streams, which a rank has redirected."""
        if self._width is None and "COLUMNS" not in os.environ and self.is_terminal:
            with suppress(OSError, ValueError):  # no terminal after all
                columns, lines = os.get_terminal_size(self.file.fileno())
                if columns and lines:  # a pseudo-terminal may report 0
                    return ConsoleDimensions(columns, lines)
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    # Rich takes brackets in the string of a status as markup.
    def status(self, status: RenderableType, **options: Any) -> Status:
        return super().status(styled_text(status) if isinstance(status, str) else status, **options)


def styled_text(*parts: str | tuple[str, str]) -> Text:
    """The parts, each of them a string or a string and its style, as one text; lines that follow are indented."""
    return Text.assemble(
        *(printable_message(part) if isinstance(part, str) else (printable_message(part[0]), part[1]) for part in parts)
    )
