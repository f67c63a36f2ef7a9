"""Unquoted values in recipes: text as it was written where text is meant, otherwise decimal numbers."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from tests.pipeline.recipe.test_recipe import RECIPE, write


@pytest.mark.parametrize(
    "text", ["010", "0x1F", "2024_01", "2024-01-01", "1e6", "1.10", ".5", ".inf", "no", "on", "true", "5"]
)
def test_text_is_as_it_was_written(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE.replace("name: test", f"name: {text}").replace("pretrain", text)))
    assert (recipe.name, *recipe.stages) == (text, text, "finetune", "evaluate")
    assert load_recipe(write(tmp_path), [f"name={text}"]).name == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=010", r"seed: .*not '010'; write 10, without leading zeros"),
        ("seed=0x1F", r"not '0x1F'; write it in decimal digits: 31"),
        ("seed=1_000", "not '1_000'; write 1000$"),
        ("seed=1e3", "not '1e3'; write 1000$"),
        ("seed=1.5", "not '1.5'; write a whole number$"),
        ("seed=12:00:00", "not '12:00:00'; write a number in decimal digits$"),
        ("seed=2024-01-01", "not '2024-01-01'; write a number in decimal digits$"),
        ("seed='4'", "not '4'; remove the quotes$"),
        ("seed=5 # comment", "not '5 # comment'"),
        ("seed=~", "seed: is null, and needs a value"),
        ("name=", "name: is null, and needs a value.*; .*put text into quotes"),
        ("optimizer.eps=.inf", "not '.inf'; write a number in decimal digits$"),
        ("optimizer.eps=1e999", "not '1e999'; write a number in decimal digits$"),
        ("optimizer.eps=1_0.5", "not '1_0.5'; write 10.5$"),
        ("optimizer.betas=[0.9, 0x1]", r"betas.1: .*not '0x1'"),
        ("model.depths=[1, 02]", r"depths.1: .*not '02'; write 2, without leading zeros"),
        ("pretrain.compile=1", "not '1'; write true or false, without quotes"),
        ("resources.flags=no", "flags: must be a list in brackets, not 'no'"),
        ("data=no", "data: must be a mapping of settings, not 'no'"),
    ],
)
def test_other_numbers_are_refused_with_how_to_write_them(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path), [override])


def test_an_octal_number_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml:17: stages.pretrain.epochs: .*not '010'; write 10"):
        load_recipe(write(tmp_path, RECIPE.replace("epochs: 2", "epochs: 010")))


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("yes", True), ("On", True), ("FALSE", False), ("no", False)]
)
def test_truth_values_and_null_are_read_where_they_are_meant(tmp_path: Path, text: str, value: bool) -> None:
    overrides = [f"pretrain.compile={text}", f"resources.account={text}", "data.lanes=~", "pretrain.ema_decay=null"]
    stage = load_recipe(write(tmp_path), overrides).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    assert (stage.compile, stage.resources.account, stage.data.lanes, stage.ema_decay) == (value, text, None, None)


def test_numbers_are_read_in_all_usual_decimal_forms(tmp_path: Path) -> None:
    overrides = ["optimizer.betas=[.9, 0.99]", "optimizer.eps=1E-8", "pretrain.epochs=+3.", "seed=0"]
    stage = load_recipe(write(tmp_path), overrides).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    assert (stage.optimizer.betas, stage.optimizer.eps, stage.epochs) == ((0.9, 0.99), 1e-8, 3.0)


def test_a_value_on_the_command_line_is_taken_whole(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path), ["runs=/a #1", "resources.account=#2", "data.random_augment={layers: 1, magnitude: 2} # both"]
    )
    assert recipe.runs == "/a #1"
    assert recipe.stages["pretrain"].resources.account == "#2"
    augment = recipe.stages["pretrain"].data.random_augment
    assert augment is not None
    assert augment.layers == 1


def test_an_error_in_a_mapping_on_the_command_line_is_not_reported_at_the_line_that_it_replaces(tmp_path: Path) -> None:
    text = RECIPE.replace("    resolution: 32", "    resolution: 32\n    loss: {label_smoothing: 0.1}")
    with pytest.raises(
        ConfigError, match=r"^override pretrain.loss=\{label_smoothing: x\}: .*label_smoothing: .*not 'x'"
    ):
        load_recipe(write(tmp_path, text), ["pretrain.loss={label_smoothing: x}"])


def test_empty_defaults_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe.yaml:3: stages.a.resolution: is missing"):
        load_recipe(write(tmp_path, "name: test\ndefaults:\nstages: {a: {}}"))


def test_an_override_of_one_stage_does_not_change_what_an_earlier_one_set_in_all(tmp_path: Path) -> None:
    overrides = ["data.random_augment={layers: 1, magnitude: 2}", "pretrain.data.random_augment.layers=3"]
    stages = load_recipe(write(tmp_path), overrides).stages.values()
    assert [stage.data.random_augment and stage.data.random_augment.layers for stage in stages] == [3, 1, 1]
