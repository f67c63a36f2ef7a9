"""Which settings may change between two starts of a run: declared on the fields, and not part of a run's identity."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.checkpoints.manifest import RunDigests
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import EvaluateStage, TrainStage
from pipeline.recipe.section import changeable_settings
from pipeline.runs.run_folder import run_folder
from pipeline.runs.stage_settings import digests
from tests.pipeline.recipe.test_recipe import RECIPE
from tests.support.recipes import settings_of, write_recipe

CHANGEABLE = {
    "data.train", "data.validation", "data.label_map", "data.validation_label_map",
    "data.storage", "data.cache", "data.workers", "data.skipped_share", "data.skipped_run",
    "data.verify_shards", "zero_stage", "activation_checkpointing", "compile", "fused_depthwise", "communication", "checkpoint", "evaluation", "non_finite", "log", "watchdog",
    "deterministic", "verify", "resources",
}  # fmt: skip
ONLY_IN_TRAINING = {
    "zero_stage", "activation_checkpointing", "compile", "fused_depthwise", "communication", "checkpoint", "evaluation", "non_finite", "verify"
}  # fmt: skip
DOCUMENT = Path(__file__).parents[3] / "docs/recipe.md"


def test_what_may_change_is_declared_on_these_fields() -> None:
    assert changeable_settings(TrainStage) == CHANGEABLE
    assert changeable_settings(EvaluateStage) == CHANGEABLE - ONLY_IN_TRAINING


def documented_settings() -> dict[str, bool]:
    """Dotted keys of the table in docs/recipe.md, and whether a star stands behind them."""
    text = DOCUMENT.read_text()
    table = text[text.index("| setting | default |") :].partition("\n\n")[0]
    found: dict[str, bool] = {}
    for line in table.splitlines()[2:]:
        first = line.split("|")[1]
        keys = re.findall(r"`([\w.]+)`( \*)?", first)
        # One star at the end of a row holds for all of it.
        found |= {key: bool(star) or first.rstrip().endswith("*") for key, star in keys}
    return found


def test_the_documentation_has_every_setting_and_stars_those_that_may_change() -> None:
    changeable = changeable_settings(TrainStage)
    expected = {key: any(key == it or key.startswith(f"{it}.") for it in changeable) for key in settings_of(TrainStage)}
    assert documented_settings() == expected


def run_digests(folder: Path, stage: str, *overrides: str) -> RunDigests:
    """Those of a stage of `RECIPE`, on data that exists in name only."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    fixed = ["pretrain.data.random_augment={layers: 2, magnitude: 15}", "data.evaluation_crop=center"]
    recipe = load_recipe(path, [*fixed, *overrides])
    settings = recipe.stages[stage]
    assert isinstance(settings, TrainStage)
    data: Any = SimpleNamespace(digest="d", classes=("a", "b"))
    nothing: Any = None
    return digests(TrainPlan(stage, 7, settings, data, nothing, data, nothing, 10, 0, nothing, 10))


def test_the_digests_of_a_run_are_what_they_always_were(tmp_path: Path) -> None:
    """Another digest would refuse the checkpoints of every run."""
    classes = "3554d2b8a1e34099053865de8576d1460b807430ec8c6b85315c9607ba93d308"
    assert run_digests(tmp_path, "pretrain") == RunDigests(
        "1e647ba54c0651f0d22539e4131b6a094a74aa097ec7c0d6e9a77ddbc28a584a", "d", classes
    )
    assert run_digests(tmp_path, "finetune") == RunDigests(
        "ecf7d494946645a85c32f76514a975ed3f52652900f24454d563bfd373343312", "d", classes
    )


@pytest.mark.parametrize(
    ("override", "changes_the_run"),
    [
        ("data.train=elsewhere", False),
        ("data.cache.gigabytes=7", False),
        ("zero_stage=2", False),
        ("deterministic=false", False),
        ("checkpoint.folder=elsewhere", False),
        ("resources.ranks=2", False),
        ("data.lanes=8", True),
        ("data.crop=distorted_bounding_box", True),
        ("pretrain.data.random_augment.operations=pillow", False),
        ("pretrain.data.random_augment.operations=efficientnet", True),
        *(
            (f"pretrain.{setting}", changes)
            for off, on in (
                ("cutmix_alpha=0.0", "cutmix_alpha=1.0"),
                ("mixup_probability=1.0", "mixup_probability=0.5"),
                ("mixup_switch_probability=0.5", "mixup_switch_probability=0.1"),
                ("data.color_jitter=null", "data.color_jitter={hue: 0.1}"),
                ("data.random_erasing=null", "data.random_erasing={probability: 0.1}"),
            )
            for setting, changes in ((off, False), (on, True))
        ),
        ("fused_depthwise=true", False),
        ("pretrain.verify.every_steps=100", False),
        ("optimizer.peak_learning_rate=1e-4", True),
        ("precision=fp32", True),
        ("batch.micro_size=2", True),
    ],
)
def test_only_settings_that_may_not_change_are_part_of_the_digest(
    tmp_path: Path, override: str, changes_the_run: bool
) -> None:
    assert (run_digests(tmp_path, "pretrain", override) != run_digests(tmp_path, "pretrain")) == changes_the_run


def test_a_start_is_refused_with_the_settings_that_differ_and_may_not(shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, shards)
    recipe = load_recipe(path)
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.freeze(plan_stage(recipe, "pretrain"), None)
    folder.check(plan_stage(load_recipe(path, ["checkpoint.every_steps=7", "log.samples=true"]), "pretrain"), None)
    changed = load_recipe(path, ["seed=3", "ema_decay=0.5", "log.samples=true"])
    with pytest.raises(ConfigError, match="holds a run with other settings") as refused:
        folder.check(plan_stage(changed, "pretrain"), None)
    assert str(refused.value).splitlines()[1:3] == ["  ema_decay: not given -> 0.5", "  seed: 0 -> 3"]
