"""Ranks as processes: which of several failures is told."""

import json
from pathlib import Path

import pytest

from jobs.launch import _outcome
from jobs.outcome import Outcome
from pipeline.run_folder import RunFolder

LOST = Outcome(1, "RuntimeError: connection reset by peer")


@pytest.mark.parametrize(
    ("codes", "written", "code", "message"),
    [
        ([1, -9], {0: LOST}, 137, "rank 1 was killed by SIGKILL, by someone or by the system for want of memory; the same"),
        ([1, 78], {0: LOST, 1: Outcome(78, "shard x is damaged")}, 78, "shard x is damaged"),
        ([None, 1, 70], {1: LOST, 2: Outcome(70, "the loss is nan")}, 70, "the loss is nan"),
        ([1, 75], {0: LOST, 1: Outcome(75, "stopped by SIGTERM after step 3")}, 75, "stopped by SIGTERM after step 3"),
        ([1, -10], {0: LOST}, 75, "stopped by SIGUSR1; the same command continues"),
        ([-15, -9], {}, 137, "rank 1 was killed by SIGKILL"),
        ([0, None, None], {}, 75, "asked to stop, and killed since ranks did not (rank 1, 2); the same command"),
        ([130, 130], {0: Outcome(130, "stopped"), 1: Outcome(130, "stopped")}, 130, "stopped"),
        ([None, 1], {1: LOST}, 1, "rank 1 failed: RuntimeError: connection reset by peer (log: runs/logs/rank-00001.log)"),
        ([None, 3], {}, 3, "rank 1 exited with 3 (log: runs/logs/rank-00001.log)"),
    ],
)  # fmt: skip
def test_the_cause_is_told_and_not_its_consequences(
    codes: list[int | None], written: dict[int, Outcome], code: int, message: str, tmp_path: Path
) -> None:
    for rank, outcome in written.items():
        (tmp_path / f"{rank}.json").write_text(json.dumps({"code": outcome.code, "message": outcome.message}))
    told = _outcome(codes, tmp_path, RunFolder(Path("runs")))
    assert told.code == code
    assert message in told.message
