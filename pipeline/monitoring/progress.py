"""How far a stage is, in a small file for those who look from outside: `progress.json` in the run folder."""

import json
import logging
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from data.atomic_file import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageProgress:
    """A stage after `step` of its `steps` steps."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float | None
    """None while a start is too young to tell."""
    time: float
    """When this was so, in seconds since the epoch."""

    @classmethod
    def now(cls, step: int, steps: int, *, loss: float, images_per_second: float, seconds_left: float | None) -> Self:
        """The progress at this moment."""
        return cls(step, steps, loss, images_per_second, seconds_left, time.time())

    def write(self, path: Path) -> None:
        """Publish it; a full disk costs the news and not the run."""
        try:
            write_atomically(path, json.dumps(asdict(self)) + "\n")
        except OSError as error:
            log.warning("%s: not written (%s)", path, error.strerror)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What was published last, or None."""
        try:
            content = json.loads(path.read_text())
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None
