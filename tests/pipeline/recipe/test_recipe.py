"""Recipes: defaults, overrides, and the errors for what is wrong."""

from pathlib import Path

import pytest

from jobs.frozen_recipe import frozen_recipe
from pipeline.errors import ConfigError, SeveralErrors
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import EvaluateStage, TrainStage

RECIPE = """\
name: test
defaults:
  data:
    train: shards/train
    validation: shards/validation
  model:
    name: coatnet_debug
  batch:
    global_size: 8
    micro_size: 4
  optimizer:
    peak_learning_rate: 1e-3
    weight_decay: 0.01
stages:
  pretrain:
    resolution: 32
    epochs: 2
  finetune:
    start_from: pretrain
    resolution: 48
    steps: 5
    optimizer:
      peak_learning_rate: 5.0e-5
      schedule: constant
  evaluate:
    task: evaluate
    start_from: finetune
    resolution: 48
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_apply_to_every_stage_and_its_own_keys_win(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    pretrain, finetune, evaluate = recipe.stages.values()
    assert isinstance(pretrain, TrainStage)
    assert isinstance(finetune, TrainStage)
    assert isinstance(evaluate, EvaluateStage)
    assert (pretrain.optimizer.peak_learning_rate, pretrain.optimizer.weight_decay) == (1e-3, 0.01)
    assert (finetune.optimizer.peak_learning_rate, finetune.optimizer.weight_decay) == (5e-5, 0.01)
    assert finetune.optimizer.schedule == "constant"
    assert evaluate.model.name == "coatnet_debug"


def test_relative_paths_start_at_the_folder_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.runs == str(tmp_path / "runs")
    assert recipe.stages["pretrain"].data.train == str(tmp_path / "shards/train")


def test_overrides_reach_one_stage_every_stage_and_the_top(tmp_path: Path) -> None:
    overrides = ["pretrain.epochs=7", "optimizer.peak_learning_rate=2e-4", "seed=3", "stages.finetune.steps=9"]
    recipe = load_recipe(write(tmp_path), overrides)
    pretrain, finetune, _ = recipe.stages.values()
    assert isinstance(pretrain, TrainStage)
    assert isinstance(finetune, TrainStage)
    assert (pretrain.epochs, finetune.epochs, finetune.steps) == (7, None, 9)
    assert pretrain.optimizer.peak_learning_rate == finetune.optimizer.peak_learning_rate == 2e-4
    assert recipe.seed == 3


def test_an_override_of_one_stage_does_not_change_the_shared_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["pretrain.data.lanes=2", "pretrain.batch.micro_size=8"])
    assert [stage.data.lanes for stage in recipe.stages.values()] == [2, None, None]
    assert [stage.batch.micro_size for stage in recipe.stages.values()] == [8, 4, 4]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    resolution: 32", "    resolutoin: 32", r"recipe.yaml:16: unknown key .*resolutoin; did you mean resolution\?"),
        ("    global_size: 8", "    global_sise: 8", r"recipe.yaml:9: unknown key .*global_sise; did you mean global_size\?"),
        ("name: test\n", "name: test\nstagse: 1\n", r"recipe.yaml:2: unknown key stagse; did you mean stages\?"),
        ("    epochs: 2", "    epochs: 2\n    mixup_alpha: -1", r"recipe.yaml:18: stages.pretrain.mixup_alpha: .*greater than or equal to 0, not -1"),
        ("    epochs: 2", "    epochs: 2\n    data:\n      random_augment: {layers: 2, magnitude: 31}", r"random_augment.magnitude: .*less than or equal to 30, not 31"),
        ("    epochs: 2", "    epochs: 2\n    data:\n      random_augment: {layers: 2}", r"random_augment.magnitude: is missing"),
        ("    epochs: 2", "    epochs: 2\n    cutmix_alpha: -1", r"cutmix_alpha: .*greater than or equal to 0, not -1"),
        ("    epochs: 2", "    epochs: 2\n    mixup_probability: 0", r"mixup_probability: .*greater than 0, not 0"),
        ("    epochs: 2", "    epochs: 2\n    data:\n      color_jitter: {hue: 0.6}", r"color_jitter.hue: .*less than or equal to 0.5, not 0.6"),
        ("    epochs: 2", "    epochs: 2\n    data:\n      random_erasing: {mode: pixel}", r"random_erasing.probability: is missing"),
        ("    epochs: 2", "    epochs: 2\n    data:\n      random_erasing: {probability: 0.5, mode: noise}", r"random_erasing.mode: .*'const', 'rand' or 'pixel'.* not 'noise'"),
        ("    epochs: 2", "    epochs: two", r"recipe.yaml:17: stages.pretrain.epochs: .*valid number.* not 'two'"),
        ("    micro_size: 4", '    micro_size: "4"', r"recipe.yaml:10: .*micro_size: .*valid integer.* not '4'"),
        ("    micro_size: 4", "    micro_size: 3", r"recipe.yaml:8: .*micro_size 3 does not divide global_size 8; [24] would"),
        ("    epochs: 2", "    epochs: 2\n    steps: 3", r"recipe.yaml:15: .*either as epochs or as steps"),
        ("    resolution: 32\n", "", r"recipe.yaml:15: stages.pretrain.resolution: is missing"),
        ("start_from: pretrain", "start_from: pretrian", r"pretrian is not an earlier stage \(pretrain\); did you mean pretrain\?"),
        ("start_from: pretrain", "start_from: pretrain\n    start_weights: ema", r"start_weights: pretrain has no ema_decay, so there is no moving average; set it there, or use raw"),
        ("start_from: pretrain", "start_from: finetune", r"finetune is not an earlier stage \(pretrain\); write \./NAME or /PATH for a file"),
        ("task: evaluate", "task: evalute", r"recipe.yaml:26: stages.evaluate.task: .*must be train or evaluate"),
        ("name: test", "name: a/b", r"recipe.yaml:1: name: "),
        ("    epochs: 2", "    epochs: 2\n    epochs: 3", r"recipe.yaml:18: .*epochs is given twice \(first at .*:17\); remove one"),
        ("    epochs: 2", "    epochs: 2\n   bad: [", r"recipe.yaml:\d+: not YAML"),
        ("    peak_learning_rate: 1e-3", "    peak_learning_rate: 1e-3\n    warmup_steps: 2\n    warmup_epochs: 1", "keep one"),
        ("    epochs: 2", "    epochs: 2\n    evaluation: {every_steps: 2, every_epochs: 1}", r"stages.pretrain.evaluation: every_steps and every_epochs are both given; keep one"),
        ("    epochs: 2", "    epochs: 2\n    checkpoint: {every_steps: 2, every_epochs: 1}", r"stages.pretrain.checkpoint: every_steps and every_epochs are both given; keep one"),
        ("    epochs: 2", "    epochs: 2\n    zero_stage: 0", r"zero_stage 0 with bf16_autocast"),
        ("    epochs: 2", "    epochs: 2\n    zero_stage: 3\n    compile: true", r"compile does not work with zero_stage 3"),
        ("    epochs: 2", "    epochs: 2\n    communication: {gradients: bf16}", r"communication.gradients: with bf16_autocast they are float32, and are summed as such; leave it out, or use precision bf16"),
        ("    epochs: 2", "    epochs: 2\n    zero_stage: 3\n    fused_depthwise: true", r"fused_depthwise does not work with zero_stage 3; use zero_stage 2"),
        ("    epochs: 2", "    epochs: 2\n    deterministic: false\n    verify: {every_steps: 10}", r"verify.every_steps: without deterministic, GPUs that work compute other bits than each other; leave deterministic out, or verify"),
        ("    epochs: 2", "    epochs: 2\n    verify: {excluded_nodes: -1}", r"verify.excluded_nodes: .*greater than or equal to 0, not -1"),
        ("stages:\n", "stages: 5\nmore:\n", r"unknown key more"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, RECIPE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("overrides", "crop"),
    [
        ([], "whole"),
        (["resolution=159"], "whole"),
        (["resolution=160"], "center"),
        (["resolution=224"], "center"),
        (["data.evaluation_crop=center"], "center"),
        (["resolution=224", "data.evaluation_crop=whole"], "whole"),
    ],
)
def test_small_images_are_evaluated_whole_unless_the_recipe_says_otherwise(
    tmp_path: Path, overrides: list[str], crop: str
) -> None:
    stages = load_recipe(write(tmp_path), overrides).stages
    assert {stage.data.evaluation_crop for name, stage in stages.items()} == {crop}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning=1", "unknown key lerning"),
        ("pretrain.epoch=1", r"override pretrain.epoch=1: unknown key stages.pretrain.epoch; did you mean epochs\?"),
        ("pretrain.epochs=x", r"override pretrain.epochs=x: stages.pretrain.epochs: .* not 'x'"),
        ("pretrain.epochs", "an override is written key=value"),
        ("pretrain.epochs.deep=1", "epochs is a single value"),
        ("seed=[", "the value is not YAML"),
        ('resources.flags=["--comment=a\\0b"]', r"b\"\]: the value has the character U\+0000; remove it$"),
        ("resolution=100000000", "resolution: input should be less than or equal to 8192, not 100000000"),
    ],
)
def test_errors_in_an_override_name_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path), [override])


def test_a_missing_or_empty_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, ""))
    with pytest.raises(ConfigError, match="Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="binary.yaml:1: not a text file"):
        load_recipe(tmp_path / "binary.yaml")


def test_yaml_aliases_are_copies(tmp_path: Path) -> None:
    text = RECIPE.replace("    resolution: 32\n", "    resolution: 32\n    data: &data {validation: v, train: t}\n")
    text = text.replace("    resolution: 48\n    steps", "    resolution: 48\n    data: *data\n    steps")
    recipe = load_recipe(write(tmp_path, text), ["finetune.data.lanes=4"])
    assert recipe.stages["pretrain"].data.lanes is None
    assert recipe.stages["finetune"].data.lanes == 4


def test_all_mistakes_are_kept_and_the_first_is_reported(tmp_path: Path) -> None:
    wrong = ["pretrain.epochs=x", "seed=-1"]
    with pytest.raises(SeveralErrors, match=r"seed: .* not -1 \(and 1 more\)$") as mistyped:
        load_recipe(write(tmp_path, RECIPE), wrong)
    assert [problem.partition(": ")[0] for problem in mistyped.value.problems] == [
        "override seed=-1", "override pretrain.epochs=x"
    ]  # fmt: skip
    # A mistake in `defaults` counts once, however many stages there are.
    text = RECIPE.replace("defaults:\n", "defaults:\n  sede: 1\n  stpes: {a: 1}\n", 1)
    with pytest.raises(SeveralErrors, match="unknown key stages.pretrain.sede") as unknown:
        load_recipe(write(tmp_path, text))
    assert len(unknown.value.problems) == 2


def test_a_stage_starts_from_an_earlier_stage_or_from_a_path_that_is_written_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", "/models")

    def starts(written: str) -> tuple[str | None, str | None]:
        stage = load_recipe(write(tmp_path, RECIPE), [f"finetune.start_from={written}"]).stages["finetune"]
        return stage.start_stage, stage.start_source

    (tmp_path / "big").mkdir()
    assert starts("pretrain") == ("pretrain", None)
    assert starts("big") == (None, f"{tmp_path}/big")
    assert starts("weights.pth") == (None, f"{tmp_path}/weights.pth")  # may be gone when the run continues
    assert starts("$MODELS/a") == (None, "/models/a")
    assert starts("s3://bucket/a/step-00000001") == (None, "s3://bucket/a/step-00000001")
    (tmp_path / "pretrain").mkdir()  # whatever it is, no model
    assert starts("pretrain") == ("pretrain", None)
    assert starts("./pretrain") == (None, f"{tmp_path}/pretrain")
    (tmp_path / "pretrain/config.json").touch()
    with pytest.raises(
        ConfigError, match=r"pretrain is an earlier stage, and .*/pretrain is there as well; write \./pretrain"
    ):
        starts("pretrain")
    (tmp_path / "evaluate").mkdir()
    with pytest.raises(
        ConfigError, match=r"evaluate is not an earlier stage \(pretrain\), and a path as well; write \./"
    ):
        starts("evaluate")
    frozen = frozen_recipe(load_recipe(write(tmp_path, RECIPE), ["finetune.start_from=big"]))
    frozen.write()
    assert load_recipe(frozen.path) == frozen.recipe
    assert frozen.recipe.stages["finetune"].start_from == f"{tmp_path}/big"
