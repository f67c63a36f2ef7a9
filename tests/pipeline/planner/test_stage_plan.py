"""The plan of a stage: what follows from its parts, and what it remarks."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.planner.datasets import planned_dataset
from pipeline.planner.hardware import find_cluster
from pipeline.planner.stage_plan import StagePlan, plan_cost
from pipeline.recipe.schema import Recipe
from tests.pipeline.planner.stages import CLASSES, small_stage

H100 = find_cluster("h100", 2, 2)


def planned(cluster: Any = H100, price: float | None = None, **changes: Any) -> StagePlan:
    stage = small_stage(**changes)
    recipe = Recipe(name="test", stages={"pretrain": stage})
    return plan_cost(recipe, "pretrain", cluster, planned_dataset(stage, samples=1000, classes=CLASSES), price=price)


@pytest.fixture(scope="module")
def plan() -> StagePlan:
    return planned(price=2.0)


def test_hours_energy_and_price_follow_from_the_step(plan: StagePlan) -> None:
    seconds, cost = plan.step.seconds, plan.cost
    assert cost.hours == seconds * (plan.steps / 3600)
    assert cost.gpu_hours.value == pytest.approx(2 * cost.hours.value)
    assert cost.price is not None
    assert cost.price.value == pytest.approx(2 * cost.gpu_hours.value)
    facility = H100.law.facility
    assert cost.energy.value == pytest.approx(cost.gpu_hours.value * 0.7 * facility.value)
    assert cost.energy.least < cost.energy.value < cost.energy.most
    assert cost.hours_with_failures is not None
    assert cost.hours_with_failures.value == pytest.approx(
        cost.hours.value / plan.useful.exact + plan.timing.start / 3600
    )


def test_steps_of_epochs_are_those_of_a_run() -> None:
    assert planned(steps=None, epochs=2.0).steps == 63  # 2,000 images in steps of 32


def test_ranks_that_do_not_share_a_step_are_refused_as_by_a_start() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide the 8 micro-batches of a step"):
        planned(find_cluster("h100", 3, 3))


def remarks(**changes: Any) -> str:
    return "\n".join(planned(**changes).remarks)


def test_what_is_not_counted_or_would_be_faster_is_said() -> None:
    usual = remarks(data={"train": "none/train", "validation": "none/validation", "workers": 64})
    assert usual.splitlines()[-1].startswith("hours and GPU-hours are those of training alone")
    assert "fp32" not in usual
    assert "data.workers" not in usual
    assert "with bf16_autocast, whose weights stay float32, a step would take " in remarks(precision="fp32")
    assert "fused_depthwise is not in the estimate" in remarks(fused_depthwise=True)
    assert "resources.gpus_per_rank is 0" in remarks(resources={"gpus_per_rank": 0})
    slow = remarks(data={"train": "none/train", "validation": "none/validation", "workers": 1})
    assert "data.workers: 1 reader thread of a rank can deliver " in slow


def test_few_cores_and_a_full_gpu_are_remarked() -> None:
    assert "a node has 1 core and its readers keep " in remarks(cluster=replace(H100, cores_per_node=1))
    assert "it does not fit: a GPU needs " in remarks(cluster=replace(H100, memory=1e9))


def test_a_stage_shorter_than_its_interval_saves_at_its_end() -> None:
    assert planned(steps=100, checkpoint={"every_steps": 1000}).timing.interval == 100


def test_failures_that_come_too_often_leave_no_time_to_end() -> None:
    plan = planned(steps=10**13, checkpoint={"every_steps": 10**13})  # thousands of years without a save
    assert plan.useful.exact == 0
    assert plan.cost.hours_with_failures is None
