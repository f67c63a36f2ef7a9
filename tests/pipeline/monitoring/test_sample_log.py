"""The log of samples that were trained on; end_to_end/test_faults.py compares its content with the sample order."""

from pathlib import Path

import pytest
import torch

from pipeline.monitoring.sample_log import SampleLog
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from tests.support.recipes import write_recipe


def test_on_a_full_disk_a_line_is_lost_and_the_run_continues(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_stage(load_recipe(write_recipe(tmp_path, shards)), "pretrain", 1)
    assert isinstance(plan, TrainPlan)
    folder = RunFolder(tmp_path)
    log = SampleLog(folder, plan, Ranks(0, 1, torch.device("cpu")))
    (folder.samples / "rank-00000.jsonl").symlink_to("/dev/full")
    log.write(7, [])
    assert "the samples of step 7 are missing from the sample log: [Errno 28] No space left on device" in caplog.text
