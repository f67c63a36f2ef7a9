"""What the console makes of text that looks like markup or contains what terminals obey."""

import io
from collections.abc import Callable

import pytest
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.monitoring.console import PrintableConsole, styled_text

HOSTILE = "[/red] [bold]x[/] :smile: \x1b]0;title\x07\r\x1b[8m \u202e https://host/x.tar?SECRET"
SHOWN = r"[/red] [bold]x[/] :smile: \x1b]0;title\x07\r\x1b[8m \u202e https://host/x.tar?..."


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of terminal in which rich moves the cursor."""
    monkeypatch.setenv("TERM", "xterm-256color")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def in_table(text: str) -> Table:
    table = Table(text, title=text)
    table.add_row(text)
    return table


@pytest.mark.parametrize("put", [str, styled_text, lambda text: styled_text((text, "red")), in_table])
@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_text_is_shown_as_it_is_and_escaped(put: Callable[[str], RenderableType], file: type[io.StringIO]) -> None:
    output = file()
    console = PrintableConsole(file=output, width=200)
    console.no_color = True
    console.print(put(HOSTILE))
    assert SHOWN in output.getvalue()
    plain = output.getvalue().replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")
    assert "\x1b" not in plain
    assert "\r" not in plain


def test_other_objects_of_rich_are_escaped_as_they_are_written() -> None:
    output = io.StringIO()
    PrintableConsole(file=output, width=200).print(Text("\x1b]0;x \u202e"), Text.assemble("\x9b"))
    assert output.getvalue() == "\\x1b]0;x \\u202e \\u009b\n"


def test_a_status_is_no_markup() -> None:
    output = Terminal()
    console = PrintableConsole(file=output, width=200)
    with console.status(HOSTILE) as status:
        status.update(styled_text(HOSTILE))
    assert SHOWN in output.getvalue()


def test_what_moves_the_cursor_for_the_program_is_kept() -> None:
    output = Terminal()
    console = PrintableConsole(file=output, width=200)
    with Live("one", console=console, auto_refresh=False, redirect_stdout=False) as live:
        live.update("two", refresh=True)
    assert "\x1b[2K" in output.getvalue()
