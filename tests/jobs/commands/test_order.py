"""`coatnet order`: its samples of a step are those that the readers read, on any number of ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from data.images.augment import TrainTransform
from data.images.decode import decode
from data.sample_reader import SampleReader
from data.stream import RankShare, training_stream
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from tests.servers.s3 import S3Server
from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


def audit(*arguments: str | Path) -> list[dict[str, object]]:
    done = coatnet("order", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_the_audit_names_the_samples_that_the_stream_reads(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    rows = audit(recipe, "pretrain", "--step", "7", "--world", "4")
    assert [row["position"] for row in rows] == list(range(12))
    assert [row["rank"] for row in rows] == [n // 3 for n in range(12)]
    assert audit(recipe, "pretrain", "--step", "7", "--world", "2", "--rank", "1") == [
        {**row, "rank": 1} for row in rows[6:]
    ]

    plan = plan_stage(load_recipe(recipe), "pretrain")
    assert isinstance(plan, TrainPlan)
    whole = TrainTransform(24, crop="whole", flip=False)
    stream = training_stream(plan.train, plan.order, whole, RankShare(0, 1, 12), first_step=7, workers=1)
    (batch,) = itertools.islice(stream, 1)
    reader = SampleReader(plan.train, None)
    names = [shard.name for shard in plan.train.index.shards]
    for row, image in zip(rows, batch.images, strict=True):
        sample = reader.read(names.index(str(row["shard"])), int(str(row["index"])))
        assert sample.key == row["key"]
        assert np.array_equal(decode(sample.image), image)


def test_the_audit_of_remote_shards_is_that_of_local_ones(shards: Path, s3: S3Server, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    url = s3.put(shards, "audit")
    changes = [f"data.train={url}/train", f"data.cache.folder={tmp_path / 'cache'}", "data.cache.gigabytes=1"]
    assert audit(recipe, "pretrain", "--step", "3", *changes) == audit(recipe, "pretrain", "--step", "3")


def test_without_json_a_table_is_printed(shards: Path, tmp_path: Path) -> None:
    done = coatnet("order", write_recipe(tmp_path, shards), "pretrain")
    assert "pretrain: step 0 of 40" in done.stdout
    assert done.stdout.count("train-0000") == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--step", "40"], "--step 40: stage pretrain has 40 steps, so the last is 39"),
        (["pretrain", "--world", "2", "--rank", "2"], "--rank 2: there are 2 ranks, so the last is 1"),
        (["pretrain", "--world", "3"], "3 ranks do not divide the 4 micro-batches of a step"),
        (["evaluate"], "stage evaluate evaluates, so it has no steps"),
    ],
)
def test_a_step_or_rank_that_does_not_exist_is_refused(
    shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = coatnet("order", write_recipe(tmp_path, shards), *arguments)
    assert done.returncode == 78
    assert message in done.stderr
