"""The progress bar of a stage, over the whole width of the terminal; a narrow one shows less beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

_LEAST_BAR = 10  # columns
_ORDER = ("loss", "speed", "left", "epoch", "rate")
"""What is kept longest on a narrow terminal, first."""


@dataclass(frozen=True, slots=True)
class StepState:
    """What is shown after a step, as words."""

    loss: str
    rate: str
    epoch: str
    speed: str
    left: str

    def text(self, width: int | None = None) -> str:
        """All of it, or as much as `width` columns have room for."""
        kept = list(_ORDER)
        while kept:
            text = "  ".join(getattr(self, name) for name in self.__slots__ if name in kept)
            if width is None or len(text) <= width:
                return text
            kept.pop()
        return ""


class _State(ProgressColumn):
    """The state of a task, as far as the terminal has room for it."""

    max_refresh = None

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        state = task.fields["state"]
        if state is None:
            return Text()
        counted = 2 * len(f"{task.total:.0f}") + 1  # "12/40"
        room = self._console.width - len(task.description) - counted - _LEAST_BAR - 3  # the columns are a space apart
        return Text(state.text(room), no_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar for tasks with a field `state`: a `StepState`, or None."""
    columns: Sequence[ProgressColumn] = (
        TextColumn("{task.description}", "bold", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(),
        _State(console),
    )
    return Progress(*columns, console=console, expand=True, disable=not console.is_terminal)
