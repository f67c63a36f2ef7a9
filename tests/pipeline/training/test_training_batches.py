"""The reader of the training loop: broken samples are recorded, and too many of them end the run."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.stream import MicroBatch, SkippedSample
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from pipeline.training.training_batches import SkippedLimits, read_micro_batches
from tests.conftest import with_broken_member
from tests.support.recipes import events, write_recipe

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> TrainPlan:
    """A plan on training shards with one broken sample."""
    with_broken_member(shards, tmp_path / "damaged", broken=2)
    recipe = write_recipe(tmp_path, shards)
    plan = plan_stage(load_recipe(recipe, [f"data.train={tmp_path / 'damaged'}"]), "pretrain", 1)
    assert isinstance(plan, TrainPlan)
    return plan


def test_a_broken_sample_is_recorded_in_the_event_log_and_the_run_continues(damaged: TrainPlan, tmp_path: Path) -> None:
    reader = read_micro_batches(damaged, RunFolder(tmp_path), ALONE, 0)
    batches = list(itertools.islice(reader, 15))  # 45 samples: each lane's first epoch
    reader.close()
    assert sum(len(batch.skipped) for batch in batches) == 1
    (entry,) = events(tmp_path)
    assert (entry["event"], entry["shard"], entry["rank"]) == ("sample_skipped", "train-000001.tar", 0)
    assert entry["key"].split("/")[0] in ("bright", "dark", "striped")


def test_broken_samples_beyond_the_tolerated_share_end_the_run(damaged: TrainPlan, tmp_path: Path) -> None:
    reader = read_micro_batches(damaged, RunFolder(tmp_path), ALONE, 0)
    # The one sample comes once an epoch: 11 times in 495 samples.
    with pytest.raises(
        DataError, match=r"11 of the first 4\d\d samples cannot be used \(last: .*raise data.skipped_share"
    ):
        list(itertools.islice(reader, 15 * 12))
    assert len(events(tmp_path)) == 11


def test_too_many_broken_samples_in_a_row_end_the_run(damaged: TrainPlan) -> None:
    data = damaged.stage.data.model_copy(update={"skipped_run": 4, "skipped_share": 1.0})
    limits = SkippedLimits(data, "shards")

    def batch(*broken: int) -> MicroBatch:
        skipped = [SkippedSample(position, "s.tar", f"key{position}", "broken") for position in broken]
        return MicroBatch(
            np.zeros((3, 1, 1, 3), np.uint8), np.zeros((3, 1), np.int64), np.ones(3, np.float32), skipped, []
        )

    for positions in ([0, 1, 2], [0, 2], [0, 1], [0, 0, 0]):
        limits.count(batch(*positions))
    limits.count(batch(2))
    limits.count(batch(0, 1, 2))
    with pytest.raises(
        DataError, match=r"shards: .* cannot be used \(last: key0 in s\.tar: broken\).*data\.skipped_run \(4\)"
    ):
        limits.count(batch(0))


def test_excluded_samples_are_recorded_and_do_not_count_towards_the_limits(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    plan = plan_stage(load_recipe(recipe, ["data.skipped_run=1"]), "pretrain", 1)
    assert isinstance(plan, TrainPlan)
    reader = read_micro_batches(plan, RunFolder(tmp_path), ALONE, 0)
    names = [f"{origin.shard}/{origin.key}" for batch in itertools.islice(reader, 4) for origin in batch.origins]
    reader.close()
    excluding = plan_stage(
        load_recipe(recipe, ["data.skipped_run=1", f"data.excluded_samples={json.dumps(names)}"]), "pretrain", 1
    )
    assert isinstance(excluding, TrainPlan)
    reader = read_micro_batches(excluding, RunFolder(tmp_path), ALONE, 0)
    seen = [origin for batch in itertools.islice(reader, 4) for origin in batch.origins]
    reader.close()
    assert not {f"{origin.shard}/{origin.key}" for origin in seen} & set(names)
    assert [f"{one['shard']}/{one['key']}" for one in events(tmp_path)] == names


def test_an_excluded_sample_of_a_shard_that_is_not_there_is_refused(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    with pytest.raises(
        ConfigError, match=r"data.excluded_samples: train-00001.tar/x: no shard .* did you mean train-000001.tar/x"
    ):
        plan_stage(load_recipe(recipe, ["data.excluded_samples=[train-00001.tar/x]"]), "pretrain", 1)
