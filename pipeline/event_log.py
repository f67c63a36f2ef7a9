"""The event log of a stage: what happened to it, in order, over all its starts.

`events.jsonl` has one JSON object on a line, with `time`, `event` and what belongs to the event.
"""

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunFailed

log = logging.getLogger(__name__)

STARTS_WITHOUT_PROGRESS = 3
# A stop that was asked for is none by itself: what it saved is noted, and one that saves nothing would go on for ever.
_PROGRESS = ("save", "finish", "gave_up")


@dataclass(frozen=True, slots=True)
class EventLog:
    """The event log in the file at `path`; any rank may write."""

    path: Path

    def record(self, event: str, **facts: Any) -> None:
        """Add an entry. A full disk costs the entry and not the run."""
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts}
        line = (json.dumps(entry) + "\n").encode()
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                # One call, so that ranks do not write into each other's lines and a kill leaves no half one.
                os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            log.warning("not noted in the event log (%s): %s", error.strerror, entry)

    def entries(self) -> list[dict[str, Any]]:
        """All entries that can be read, oldest first."""
        entries = []
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by a full disk
            if isinstance(entry, dict) and "event" in entry:
                entries.append(entry)
        return entries

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation after `step` steps is noted that no later start from before that step has undone."""
        for entry in reversed(self.entries()):
            if entry["event"] == "evaluation" and entry.get("step") == step:
                return True
            if entry["event"] in ("start", "resume") and entry["step"] < step:
                return False
        return False

    def begin(self, ranks: int) -> None:
        """Note a start of the stage on `ranks` ranks.

        Raises:
            RunFailed: the last starts all ended without progress; the next one is let through again.
        """
        vain = 0
        for entry in reversed(self.entries()):
            if entry["event"] in _PROGRESS:
                break
            vain += entry["event"] == "begin"
        if vain >= STARTS_WITHOUT_PROGRESS:
            self.record("gave_up", starts=vain)
            raise RunFailed(
                f"{self.path.parent}: {vain} starts in a row ended without a new checkpoint; logs and events.jsonl in "
                "this folder say how. If they ended for want of time, lower checkpoint.every_steps. The same command "
                f"tries {STARTS_WITHOUT_PROGRESS} more times"
            )
        self.record("begin", ranks=ranks)
