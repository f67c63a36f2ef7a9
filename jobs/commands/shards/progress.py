"""The progress bar of commands that read shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def reading_progress(console: Console) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes and their rate; yields a function that sets the total, and one that advances the bar."""
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda total: bar.update(task, total=total), lambda count: bar.advance(task, count)
