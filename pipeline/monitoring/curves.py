"""The curves of a stage, read back from its event files as TensorBoard shows them over all starts."""

import csv
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from pipeline.runs.run_folder import RunFolder

COLUMNS = ("run", "stage", "tag", "step", "time", "value")


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of a curve."""

    tag: str
    step: int
    time: float
    """When it was written, in seconds since the epoch."""
    value: float
    """As in the event file, which has float32."""


def read_curves(folder: RunFolder) -> Iterator[CurvePoint]:
    """All points, tag by tag in the order of the steps; those that a later start has replaced are left out."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every restart of a run
    for events_folder in filter(Path.is_dir, (folder.tensorboard, folder.validation)):
        events = EventAccumulator(str(events_folder), size_guidance={SCALARS: 0})
        events.Reload()
        for tag in sorted(events.Tags()[SCALARS]):
            for point in events.Scalars(tag):
                yield CurvePoint(tag, point.step, point.wall_time, point.value)


def write_csv(file: IO[str], run: str, stage: str, points: Iterable[CurvePoint]) -> int:
    """Write a row for each point, with `COLUMNS`: the time in UTC, the shortest decimal number of the float32 value.

    Returns the number of rows.
    """
    writer, count = csv.writer(file, lineterminator="\n"), 0
    for point in points:
        count += 1
        when = datetime.fromtimestamp(point.time, UTC).isoformat(timespec="milliseconds")
        writer.writerow((run, stage, point.tag, point.step, when, str(np.float32(point.value))))
    return count


def has_curves(folder: Path) -> bool:
    """Whether there are event files in `folder` or below."""
    return any(folder.rglob("events.out.tfevents.*"))
