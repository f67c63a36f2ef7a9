"""A log of the samples that a run was trained on: for audits, never read by the run itself."""

import logging

from data.stream import MicroBatch
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.json_lines import append_json_line
from pipeline.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


class SampleLog:
    """One rank's file in `samples/` of the run folder: a JSON line for each applied step.

    `{"step": 12, "start": 64, "epochs": [...], "ids": [...]}`: in step 12 (from 0), the positions of the global batch
    from 64 on held these samples of the index. A step repeated after a restart has several lines; the last one counts.
    """

    def __init__(self, folder: RunFolder, plan: TrainPlan, ranks: Ranks) -> None:
        folder.samples.mkdir(parents=True, exist_ok=True)
        self._path = folder.samples / f"rank-{ranks.rank:05d}.jsonl"
        self._start = ranks.rank * plan.stage.batch.global_size // ranks.world_size

    def write(self, step: int, batches: list[MicroBatch]) -> None:
        """Log a step in which this rank took `batches`; on a full disk the line is lost and the run continues."""
        origins = [origin for batch in batches for origin in batch.origins]
        line = {
            "step": step,
            "start": self._start,
            "epochs": [o.epoch for o in origins],
            "ids": [o.id for o in origins],
        }
        try:
            append_json_line(self._path, line)
        except OSError as error:
            log.warning("the samples of step %d are missing from the sample log: %s", step, error)
