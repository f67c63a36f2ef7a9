"""Which samples a run was trained on, written down as it happens: for audits, not for the run itself."""

import json
from pathlib import Path

from data.stream import MicroBatch


class SampleLog:
    """One rank's file in `folder`: a JSON line for each applied step.

    `{"step": 12, "start": 64, "epochs": [...], "ids": [...]}`: in step 12 (from 0) the positions of the global batch
    from 64 on held these samples of the index. A step taken again after a restart has a later line, which counts.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{rank:05d}.jsonl"

    def write(self, step: int, start: int, batches: list[MicroBatch]) -> None:
        """Add the line of a step whose positions from `start` on were `batches`."""
        origins = [origin for batch in batches for origin in batch.origins]
        line = {"step": step, "start": start, "epochs": [o.epoch for o in origins], "ids": [o.id for o in origins]}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
