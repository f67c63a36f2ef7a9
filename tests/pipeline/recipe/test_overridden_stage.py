"""Recorded settings of a stage with overrides: what a replay is computed with."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, SeveralErrors
from pipeline.recipe.loader import load_recipe, overridden_stage
from tests.support.recipes import write_recipe


@pytest.fixture(scope="module")
def settings(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of a stage, as a run folder records them."""
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("recipe"), shards))
    return recipe.stages["pretrain"].model_dump(mode="json")


def test_without_overrides_it_is_as_recorded(settings: dict[str, Any]) -> None:
    assert overridden_stage("pretrain", settings, []).model_dump(mode="json") == settings


@pytest.mark.parametrize("prefix", ["", "pretrain.", "stages.pretrain."])
def test_overrides_are_those_of_a_recipe(settings: dict[str, Any], prefix: str) -> None:
    wanted = [f"{prefix}optimizer.weight_decay=0.25", f"{prefix}data.random_augment={{layers: 2, magnitude: 15}}"]
    if prefix.startswith("stages"):  # the recipe around the stage is no setting of it
        with pytest.raises(ConfigError, match="not a setting of a stage; give settings of stage pretrain"):
            overridden_stage("pretrain", settings, wanted)
        return
    stage = overridden_stage("pretrain", settings, wanted)
    assert stage.optimizer.weight_decay == 0.25
    assert stage.data.random_augment is not None
    assert stage.data.random_augment.layers == 2
    assert stage.optimizer.peak_learning_rate == 3e-3


def test_relative_paths_start_at_the_working_directory(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = overridden_stage("pretrain", settings, ["data.train=shards/train", "data.cache.folder=./cache"])
    assert stage.data.train == str(tmp_path / "shards/train")
    assert stage.data.cache.folder == str(tmp_path / "cache")
    assert stage.data.validation == settings["data"]["validation"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed=1: not a setting of a stage; give settings of stage pretrain"),
        ("name=other", "name=other: not a setting of a stage"),
        ("optimizer.peek_learning_rate=1", "unknown key stages.pretrain.optimizer.peek_learning_rate; did you mean peak_l"),
        ("optimzer.weight_decay=1", "has no stage or section optimzer; did you mean optimizer?"),
        ("finetune.steps=3", "has no stage or section finetune"),
        ("steps", "steps: an override is written key=value"),
        ("optimizer.weight_decay=much", "override optimizer.weight_decay=much: stages.pretrain.optimizer.weight_decay: in"),
        ("precision=fp16", "override precision=fp16: stages.pretrain.precision: "),
        ("batch.micro_size=5", "stages.pretrain.batch: micro_size 5 does not divide global_size 12; 6 would"),
        ("steps=null", "stages.pretrain: "),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_override_and_the_stage(
    settings: dict[str, Any], override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        overridden_stage("pretrain", settings, [override])
    assert message in str(refused.value)


def test_several_mistakes_are_counted(settings: dict[str, Any]) -> None:
    with pytest.raises(SeveralErrors, match=r"\(and 1 more\)") as refused:
        overridden_stage("pretrain", settings, ["optimizer.weight_decay=x", "ema_decay=y"])
    assert len(refused.value.problems) == 2
