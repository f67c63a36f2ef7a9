"""How long a stage takes, and with which learning rate, before and after its settings are changed under way."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.runs.settings_history import VERSION, SettingsChange, SettingsHistory
from pipeline.runs.stage_settings import rank_digest
from tests.support.recipes import write_recipe


def changed(shards: Path, folder: Path, step: int, before: list[str], now: list[str]) -> TrainPlan:
    """The plan of a stage of 45 samples an epoch whose settings became `now` after `step` steps."""
    recipe = write_recipe(folder, shards)
    recipe.write_text(recipe.read_text().replace("peak_learning_rate: 0.003", "peak_learning_rate: 8.0"))
    before, now = ([f"pretrain.{setting}" for setting in settings] for settings in (before, now))
    past = load_recipe(recipe, before).stages["pretrain"].model_dump(mode="json")
    history = SettingsHistory(VERSION, (SettingsChange(step, "2026", (), past),))
    plan = plan_stage(load_recipe(recipe, now), "pretrain", history=history)
    assert isinstance(plan, TrainPlan)
    return plan


def rates(plan: TrainPlan, *steps: int) -> list[float]:
    return [plan.learning_rate(step) for step in steps]


@pytest.mark.parametrize(
    ("step", "now", "expected"),
    [
        # 8 at step 4, falling by 1 with each step to 0 at 12; the rest, from 4 at step 8 on, takes 16 steps instead of 4.
        (8, ["steps=24"], {3: 8.0, 4: 8.0, 7: 5.0, 8: 4.0, 12: 3.0, 20: 1.0}),
        (8, ["steps=10"], {7: 5.0, 8: 4.0, 9: 2.0}),
        (8, ["optimizer.schedule=constant"], {7: 5.0, 8: 4.0, 11: 4.0}),
        (8, ["optimizer.minimum_learning_rate=2.0"], {7: 5.0, 8: 4.0, 10: 3.0}),
        # Set on purpose: at once.
        (8, ["optimizer.peak_learning_rate=2.0"], {7: 5.0, 8: 2.0, 10: 1.0}),
        # A new warm-up begins at the rate of the last step, and ends at the peak: also past the end.
        (8, ["optimizer.warmup_steps=3", "steps=19"], {7: 5.0, 8: 6.0, 9: 7.0, 10: 8.0, 11: 8.0, 15: 4.0}),
        (12, ["optimizer.warmup_steps=1", "steps=21"], {11: 1.0, 12: 8.0, 13: 8.0, 17: 4.0}),
        # In the warm-up, which is finished first; to the new peak if there is one.
        (2, ["steps=20"], {1: 4.0, 2: 6.0, 3: 8.0, 4: 8.0, 12: 4.0}),
        (2, ["optimizer.peak_learning_rate=12.0"], {1: 4.0, 2: 8.0, 3: 12.0, 4: 12.0, 8: 6.0}),
        # What is no matter of the schedule leaves it as it was.
        (8, ["mixup_alpha=0.8", "optimizer.weight_decay=0.1"], {7: 5.0, 8: 4.0, 11: 1.0}),
    ],
)
def test_the_learning_rate_goes_on_from_where_it_is_unless_it_is_set(
    step: int, now: list[str], expected: dict[int, float], shards: Path, tmp_path: Path
) -> None:
    before = ["steps=12", "optimizer.schedule=linear"]
    plan = changed(shards, tmp_path, step, before, [*before, *now])
    assert rates(plan, *expected) == list(expected.values())


def test_a_schedule_that_is_not_changed_is_the_same_object_of_the_same_numbers(shards: Path, tmp_path: Path) -> None:
    before = ["steps=12", "optimizer.schedule=cosine"]
    plan = changed(shards, tmp_path, 7, before, [*before, "data.flip=false", "batch.global_size=24"])
    undisturbed = changed(shards, tmp_path, 7, before, before)
    assert rates(plan, *range(12)) == rates(undisturbed, *range(12))


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        (4, 8 + 4),  # 180 samples, of which 96 are drawn: 84 are left, in batches of 24
        (2.2, 8 + 1),
    ],
)
def test_epochs_count_samples_whatever_the_batches_were(
    epochs: float, steps: int, shards: Path, tmp_path: Path
) -> None:
    before = ["steps=null", "epochs=3"]
    now = ["steps=null", f"epochs={epochs}", "batch.global_size=24"]
    plan = changed(shards, tmp_path, 8, before, now)
    assert plan.steps == steps
    assert [plan.samples_after(step) for step in (0, 7, 8, 9)] == [0, 84, 96, 120]
    same = changed(shards, tmp_path, 8, before, ["steps=null", "epochs=4"])
    assert same.steps == 15  # as a stage of 4 epochs from the beginning
    assert [(part.first_step, part.until, part.steps) for part in same.parts] == [(0, 8, 15), (8, 15, 15)]


def test_lanes_that_the_recipe_leaves_to_the_batch_stay_those_of_the_first_one(shards: Path, tmp_path: Path) -> None:
    derived = ["data.lanes=null"]
    plan = changed(shards, tmp_path, 8, derived, [*derived, "batch.global_size=36"])
    assert (plan.order.lanes, plan.order.batch, plan.order.offset) == (12, 36, 8 * (1 - 3))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (["optimizer.minimum_learning_rate=6.0"], "6 is above the learning rate at step 8, 4; lower it, or set optimiz"),
        (["steps=8"], "the stage stands at step 8 and would end at 8; set more"),
        (["optimizer.warmup_steps=9"], "the warm-up of 9 steps after step 8 fills the stage's 12"),
        (["batch.global_size=18"], "draws its samples from 4 lanes, which go on and do not divide 18; set a multiple of"),
    ],
)  # fmt: skip
def test_settings_that_cannot_follow_are_refused(now: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    before = ["steps=12", "optimizer.schedule=linear"]
    with pytest.raises(ConfigError) as refused:
        changed(shards, tmp_path, 8, before, [*before, *now])
    assert message in str(refused.value)


def test_what_may_change_at_any_start_is_that_of_now_in_all_parts(shards: Path, tmp_path: Path) -> None:
    now: list[Any] = ["data.workers=3", "zero_stage=2", "mixup_alpha=0.5", "checkpoint.keep_last=7"]
    plan = changed(shards, tmp_path, 8, ["data.workers=1"], now)
    old = plan.at(7).stage
    assert (old.data.workers, old.zero_stage, old.checkpoint.keep_last) == (3, 2, 7)
    assert (old.mixup_alpha, plan.at(8).stage.mixup_alpha) == (0.0, 0.5)


def test_settings_of_the_past_that_contradict_those_of_now_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="the settings before step 8 do not work with those of now: zero_stage 0 with"
    ):
        changed(shards, tmp_path, 8, ["precision=bf16"], ["precision=fp32", "zero_stage=0"])


def test_ranks_that_have_read_another_history_are_told_apart(shards: Path, tmp_path: Path) -> None:
    now = ["mixup_alpha=0.5"]
    plans = [
        changed(shards, tmp_path, step, before, now) for step, before in ((8, []), (7, []), (8, ["ema_decay=0.5"]))
    ]
    assert len({rank_digest(plan) for plan in plans}) == 3
    assert rank_digest(plans[0]) == rank_digest(changed(shards, tmp_path, 8, [], now))
