"""How much a stage trains on, from an index or before there is one."""

from pathlib import Path
from typing import Any

import pytest

from data.index import read_index
from data.remote.storage import Storage
from pipeline.errors import ConfigError
from pipeline.planner.datasets import KNOWN, planned_dataset
from pipeline.planner.hardware import bundled_hardware, figure_range
from pipeline.recipe.schema import TrainStage
from tests.pipeline.planner.stages import small_stage


def stage_of(folder: Path | str, **data: Any) -> TrainStage:
    return small_stage(data={"train": str(folder), "validation": "none"} | data)


def test_shards_that_exist_say_what_they_hold(shards: Path) -> None:
    found = planned_dataset(stage_of(shards / "train"))
    index = read_index(str(shards / "train"), Storage())
    assert (found.samples, found.classes, found.shards) == (45, 3, len(index.shards))
    assert found.image_bytes.is_exact
    assert found.image_bytes.value == sum(shard.bytes for shard in index.shards) / 45
    assert found.source == f"the index of {shards / 'train'}"


def test_what_is_given_replaces_what_is_found(shards: Path) -> None:
    found = planned_dataset(stage_of(shards / "train"), samples=1000)
    assert (found.samples, found.classes) == (1000, 3)
    assert found.source == f"the index of {shards / 'train'}, and what was given"


@pytest.mark.parametrize("name", list(KNOWN))
def test_public_datasets_are_known_before_they_have_shards(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / name / "train", tmp_path / name):
        found = planned_dataset(stage_of(folder))
        assert (found.samples, found.classes) == KNOWN[name]
        assert found.shards == -(-found.samples // 4096)
        assert found.image_bytes == figure_range(bundled_hardware().law.image_bytes)
        assert found.source == f"assumed by its name, since {folder}: no index.json there"


def test_a_part_of_what_is_known_can_be_given(tmp_path: Path) -> None:
    found = planned_dataset(stage_of(tmp_path / "in1k" / "train"), classes=10)
    assert (found.samples, found.classes) == (1_281_167, 10)
    missing = f"{tmp_path / 'in1k' / 'train'}: no index.json there"
    assert found.source == f"assumed by its name, since {missing}, and as given"


def test_unknown_data_has_to_be_given(tmp_path: Path) -> None:
    stage = stage_of(tmp_path / "mine" / "train")
    for given in ({}, {"samples": 10}, {"classes": 10}):
        with pytest.raises(ConfigError) as refused:
            planned_dataset(stage, **given)
        assert str(refused.value).startswith(
            f"data.train: the number of samples and classes of {tmp_path}/mine/train is not known"
        )
        assert str(refused.value).endswith("give them by --samples and --classes")
    found = planned_dataset(stage, samples=9000, classes=10)
    assert (found.samples, found.classes, found.shards, found.source) == (9000, 10, 3, "as given")
