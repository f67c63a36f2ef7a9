"""The rows of a replay on the leader, written as they come: pictures and curves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.ranks.distributed import Ranks
from pipeline.replay.curves import ReplayCurves, write_picture
from pipeline.replay.inspection import Inspection
from pipeline.replay.report import StepRow


class Results:
    """The rows of the steps.

    Args:
        out: folder of the pictures.
        curves: in TensorBoard.
    """

    def __init__(self, out: Path, curves: ReplayCurves) -> None:
        self._out, self._curves = out, curves
        self.rows: list[StepRow] = []

    def add(self, row: StepRow, inspection: Inspection | None) -> None:
        """Add a step."""
        self.rows.append(row)
        self._curves.add(row, inspection.picture if inspection else None)
        if inspection and row.picture:
            write_picture(self._out / row.picture, inspection.picture)


@contextmanager
def open_results(
    out: Path, curves: Path, first: int, ranks: Ranks, notify: Callable[[str], None]
) -> Iterator[Results | None]:
    """Where the leader adds its rows, of steps from `first` on; None on other ranks.

    `curves` is the folder of the event file, and `notify` is called with a message if it cannot be written.
    """
    if not ranks.is_leader:
        yield None
        return
    with ReplayCurves(curves, first, notify) as opened:
        yield Results(out, opened)
