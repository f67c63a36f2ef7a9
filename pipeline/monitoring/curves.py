"""The curves of a stage as CSV."""

import csv
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.monitoring.event_reader import CurvePoint

COLUMNS = ("run", "stage", "tag", "step", "time", "value")


def write_csv(file: IO[str], run: str, stage: str, curves: Mapping[str, Sequence[CurvePoint]]) -> int:
    """Write a row with `COLUMNS` for each point, tag by tag in the order of the steps.

    The time is in UTC, and the value the shortest decimal number of its float32.

    Returns the number of rows.
    """
    writer, count = csv.writer(file, lineterminator="\n"), 0
    for tag, points in sorted(curves.items()):
        for step, value, time in points:
            when = datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")
            writer.writerow((run, stage, tag, step, when, str(np.float32(value))))
        count += len(points)
    return count


def has_curves(folder: Path) -> bool:
    """Whether there are event files in `folder` or below."""
    return any(folder.rglob("events.out.tfevents.*"))
