"""The progress of a stage, published in a small file for other processes: `progress.json` in the run folder."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from data.files.atomic_file import write_atomically
from data.files.json_records import parse_json
from data.files.regular_file import read_regular

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageProgress:
    """A stage after `step` of its `steps` steps."""

    step: int
    steps: int
    loss: float
    images_per_second: float | None
    """None until a step of a start was timed."""
    seconds_left: float | None
    """None until a start has run long enough for an estimate."""
    time: float
    """Of this record, in seconds since the epoch."""

    @classmethod
    def now(
        cls, step: int, steps: int, *, loss: float, images_per_second: float | None, seconds_left: float | None
    ) -> Self:
        """The progress at this moment."""
        return cls(step, steps, loss, images_per_second, seconds_left, time.time())

    def write(self, path: Path) -> None:
        """Publish it; on a full disk the update is lost and the run continues."""
        try:
            write_atomically(path, json.dumps(asdict(self)) + "\n")
        except OSError as error:
            log.warning("%s: not written (%s)", path, error.strerror)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The progress published last; None if there is none that can be read."""
        try:
            return parse_json(cls, read_regular(path))
        except (OSError, ValueError):
            return None
