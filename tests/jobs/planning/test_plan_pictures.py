"""What the pictures of a plan are drawn from."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jobs.planning.pictures import memory_bar, scaling_points, step_timeline
from pipeline.planner.alternatives import Alternative
from pipeline.planner.datasets import PlannedDataset
from pipeline.planner.hardware import find_cluster
from pipeline.planner.pictures.step_timeline import StepTimeline
from pipeline.planner.ranges import Range
from pipeline.planner.stage_memory import gpu_memory
from pipeline.planner.stage_plan import StagePlan, plan_cost
from pipeline.planner.step_estimate import StepEstimate, estimate_step
from pipeline.recipe.schema import Recipe
from tests.pipeline.planner.stages import CLASSES, small_stage

NO_TIME = Range.exactly(0.0)


def estimate(gpus: int = 4, **changes: Any) -> StepEstimate:
    return estimate_step(small_stage(**changes), CLASSES, find_cluster("h100", gpus, 8, link=1e6))


def lengths(timeline: StepTimeline, kind: str) -> list[float]:
    return [span.end - span.start for span in timeline.spans if span.kind == kind]


def seconds(found: Range) -> float:
    """In milliseconds, as pictures have them."""
    return 1e3 * found.value


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("overlap", [True, False])
def test_all_communication_of_a_step_is_drawn_once(zero_stage: int, overlap: bool) -> None:
    step = replace(estimate(zero_stage=zero_stage, communication={"overlap": overlap}), issuing=NO_TIME)
    timeline = step_timeline(step, 0.0)
    exposed, hidden = lengths(timeline, "exposed communication"), lengths(timeline, "hidden communication")
    assert sum(exposed) == pytest.approx(seconds(step.communication.exposed))
    assert sum(hidden) == pytest.approx(seconds(step.communication.total) - seconds(step.communication.exposed))
    assert bool(hidden) == (overlap and zero_stage > 1)
    assert max(span.end for span in timeline.spans) == pytest.approx(timeline.step)


def test_every_micro_batch_has_its_parts_in_their_order() -> None:
    step = estimate(activation_checkpointing="mbconv")
    timeline = step_timeline(step, 0.0)
    for kind in ("forward", "recomputation", "backward"):
        part: Range = getattr(step, kind)
        assert lengths(timeline, kind) == pytest.approx([seconds(part)] * 2)
    computed = [span for span in timeline.spans if span.kind in ("forward", "recomputation", "backward")]
    assert [span.micro_batch for span in computed] == [0, 0, 0, 1, 1, 1]
    for one, after in pairwise(computed):
        assert after.start == pytest.approx(one.end)
    assert lengths(timeline, "optimizer") == pytest.approx([seconds(step.optimizer)])
    assert lengths(step_timeline(estimate(), 0.0), "recomputation") == []


def test_a_host_that_is_slower_than_the_gpu_issues_until_the_end() -> None:
    step = replace(estimate(1), issuing=Range.exactly(1.0))
    timeline = step_timeline(step, 0.0)
    assert (timeline.step, timeline.least, timeline.most) == (1e3, None, None)
    assert sum(lengths(timeline, "host")) == pytest.approx(1e3)
    assert max(span.end for span in timeline.spans) == pytest.approx(1e3)


def test_a_bar_of_memory_is_what_a_step_needs() -> None:
    stage = small_stage(zero_stage=2, ema_decay=0.9)
    memory = gpu_memory(stage, CLASSES, find_cluster("h100", 4, 8))
    bar = memory_bar(Alternative(2, "none", 4, memory, 4, None, True), recommended=False)
    parts = (
        bar.weights,
        bar.gradients,
        bar.optimizer_state,
        bar.moving_average,
        bar.buffers,
        bar.buckets,
        bar.activations,
    )
    assert sum(parts) == memory.step.total
    assert (bar.reserve, bar.total) == (memory.reserve, memory.needed)
    assert (bar.in_recipe, bar.recommended) == (True, False)


def test_scaling_goes_from_a_node_to_as_many_gpus_as_micro_batches() -> None:
    recipe = Recipe.model_validate(
        {"name": "small", "stages": {"one": small_stage(batch={"global_size": 32, "micro_size": 1}).model_dump()}}
    )
    dataset = PlannedDataset(1000, CLASSES, 1, Range.exactly(1e5), "made up")
    plan: StagePlan = plan_cost(recipe, "one", find_cluster("h100", 4, 2), dataset)
    points = scaling_points(plan)
    assert [point.gpus for point in points] == [2, 4, 8, 16, 32]
    (own,) = [point for point in points if point.gpus == 4]
    assert own.images_per_second == plan.step.images_per_second.value
