"""What the progress bar shows on terminals of different widths."""

import fcntl
import io
import os
import pty
import struct
import termios

import pytest
from rich.console import Console

from pipeline.monitoring.console import PrintableConsole
from pipeline.monitoring.progress_bar import StepState, progress_bar

STATE = StepState("loss 1.2345", "lr 1.00e-03", "epoch 12.5/300.0", "1,234 images/s", "ETA 1:02:03")


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (150, "loss 1.2345  lr 1.00e-03  epoch 12.5/300.0  1,234 images/s  ETA 1:02:03"),
        (100, "loss 1.2345  epoch 12.5/300.0  1,234 images/s  ETA 1:02:03"),
        (80, "loss 1.2345  1,234 images/s  ETA 1:02:03"),
        (60, "loss 1.2345  1,234 images/s"),
        (40, ""),
    ],
)
def test_the_bar_fills_the_terminal_and_leaves_out_what_has_no_room(width: int, shown: str) -> None:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    progress = progress_bar(console)
    progress.add_task("pretrain", total=1407, completed=700, state=STATE)
    console.print(progress.get_renderable())
    (line,) = output.getvalue().splitlines()
    assert width - 1 <= len(line) <= width
    assert line.startswith("pretrain ━")
    assert line.rstrip().endswith(f"700/1407 {shown}".rstrip())


def test_the_width_is_that_of_the_terminal_that_it_writes_to_also_after_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal, inside = pty.openpty()
    with os.fdopen(inside, "w") as file:
        console = PrintableConsole(file=file)
        for columns in (137, 91):
            fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
            assert (console.width, console.height) == (columns, 40)
    os.close(terminal)
