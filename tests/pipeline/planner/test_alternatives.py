"""Other settings of a stage that compute the same, and which of them is recommended."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data.order import SampleOrder, default_lanes
from pipeline.planner.alternatives import (
    Alternative,
    alternatives,
    best_lanes,
    policy_name,
    possible_zero_stages,
    recommend,
)
from pipeline.planner.hardware import Cluster, find_cluster
from pipeline.planner.ranges import NOTHING, Range
from pipeline.planner.stage_memory import GpuMemory, gpu_memory
from pipeline.planner.step_estimate import StepEstimate, estimate_step
from pipeline.recipe.schema import TrainStage
from tests.pipeline.planner.stages import CLASSES, small_stage

BATCH = {"global_size": 16, "micro_size": 4}
STAGE = small_stage(batch=BATCH)
CLUSTER = find_cluster("h100", 4, 2)


@pytest.fixture(scope="module")
def found() -> tuple[Alternative, ...]:
    return alternatives(STAGE, CLASSES, CLUSTER)


@pytest.fixture(scope="module")
def step() -> StepEstimate:
    """Of which no part takes time."""
    empty = replace(
        estimate_step(STAGE, CLASSES, CLUSTER), forward=NOTHING, recomputation=NOTHING, backward=NOTHING,
        optimizer=NOTHING, issuing=NOTHING, micro_batches=1,
    )  # fmt: skip
    return replace(empty, communication=replace(empty.communication, exposed=NOTHING))


@pytest.fixture(scope="module")
def memory() -> GpuMemory:
    return gpu_memory(STAGE, CLASSES, CLUSTER)


def test_every_zero_stage_is_combined_with_every_policy(found: tuple[Alternative, ...]) -> None:
    expected = [(zero, policy) for zero in (1, 2, 3) for policy in ("none", "mbconv", "every_block")]
    assert [(one.zero_stage, one.policy) for one in found] == expected
    assert [one.is_own for one in found] == [(one.zero_stage, one.policy) == (1, "none") for one in found]


def test_an_alternative_is_what_a_stage_with_its_settings_would_be(found: tuple[Alternative, ...]) -> None:
    other = next(one for one in found if (one.zero_stage, one.policy) == (2, "mbconv"))
    stage = small_stage(batch=BATCH, zero_stage=2, activation_checkpointing="mbconv")
    assert other.memory == gpu_memory(stage, CLASSES, CLUSTER)
    assert other.step == estimate_step(stage, CLASSES, CLUSTER)
    assert other.largest_micro_size == 4  # a GPU's share of the global batch


def test_the_recipes_own_policy_is_among_them() -> None:
    own = [
        one
        for one in alternatives(small_stage(batch=BATCH, activation_checkpointing=3), CLASSES, CLUSTER)
        if one.is_own
    ]
    assert [(one.zero_stage, one.policy) for one in own] == [(1, 3)]
    assert (policy_name(3), policy_name(1)) == ("every 3 blocks recomputed", "every block recomputed")


def test_what_does_not_fit_has_no_time() -> None:
    tiny = replace(CLUSTER, memory=1e9)  # less than CUDA takes
    found = alternatives(STAGE, CLASSES, tiny)
    assert {(one.step, one.largest_micro_size) for one in found} == {(None, None)}
    chosen = recommend(STAGE, CLASSES, tiny, found, 1000)
    assert not chosen.fits
    assert chosen.settings["batch.micro_size"] == 4
    least = min(found, key=lambda one: one.memory.needed)
    assert (chosen.settings["zero_stage"], chosen.settings["activation_checkpointing"]) == (
        least.zero_stage,
        least.policy,
    )
    assert chosen.reasons["zero_stage"] == "needs the least memory"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"precision": "fp32"}, [0, 1, 2, 3]),
        ({"precision": "bf16"}, [1, 2, 3]),
        ({"precision": "bf16_autocast"}, [1, 2, 3]),
        ({"compile": True}, [1, 2]),
        ({"fused_depthwise": True}, [1, 2]),
    ],
)
def test_zero_stages_are_those_that_a_recipe_may_have(changes: dict[str, Any], expected: list[int]) -> None:
    assert possible_zero_stages(small_stage(**changes)) == expected
    for zero_stage in range(4):
        if zero_stage in expected:
            small_stage(zero_stage=zero_stage, **changes)
        else:
            with pytest.raises(ValueError, match="zero_stage"):
                small_stage(zero_stage=zero_stage, **changes)


class Options:
    """Alternatives with made-up times."""

    def __init__(self, step: StepEstimate, memory: GpuMemory, own: tuple[int, str] = (1, "none")) -> None:
        self.step, self.memory, self.own = step, memory, own

    def __call__(self, zero_stage: int, policy: Any, seconds: float | None, largest: int | None = 8) -> Alternative:
        step = None if seconds is None else replace(self.step, forward=Range.exactly(seconds))
        memory = self.memory if seconds is not None else replace(self.memory, size=1)
        return Alternative(zero_stage, policy, 4, memory, largest, step, (zero_stage, policy) == self.own)


@pytest.fixture
def option(step: StepEstimate, memory: GpuMemory) -> Options:
    return Options(step, memory)


def chosen(*found: Alternative, stage: TrainStage = STAGE, cluster: Cluster = CLUSTER) -> tuple[Any, Any, str]:
    result = recommend(stage, CLASSES, cluster, found, 1000)
    assert result.fits
    assert (result.stage.zero_stage, result.stage.activation_checkpointing) == (
        result.settings["zero_stage"], result.settings["activation_checkpointing"],
    )  # fmt: skip
    return result.settings["zero_stage"], result.settings["activation_checkpointing"], result.reasons["zero_stage"]


def test_the_fastest_that_fits_is_recommended(option: Options) -> None:
    found = chosen(option(1, "none", 2.0), option(1, "mbconv", 1.5), option(2, "none", 1.0), option(2, "mbconv", None))
    assert found == (2, "none", "2.00 times as fast as the recipe's by estimate")


@pytest.mark.parametrize(("seconds", "expected"), [(1.04, (1, "none")), (1.06, (2, "none"))])
def test_the_recipes_own_is_kept_if_it_is_at_most_a_twentieth_slower(
    option: Options, seconds: float, expected: Any
) -> None:
    assert chosen(option(1, "none", seconds), option(2, "none", 1.0))[:2] == expected


def test_zero_3_is_recommended_only_if_nothing_else_fits(option: Options) -> None:
    fitting = (option(1, "none", None), option(2, "none", 5.0), option(3, "none", 1.0))
    assert chosen(*fitting) == (2, "none", "the fastest that fits by estimate; the recipe's own does not")
    alone = (option(1, "none", None), option(2, "none", None), option(3, "none", 1.0), option(3, "mbconv", 2.0))
    assert chosen(*alone)[:2] == (3, "none")


def test_a_recipe_with_zero_3_is_told_why_it_is_not_recommended(step: StepEstimate, memory: GpuMemory) -> None:
    option = Options(step, memory, own=(3, "none"))
    zero_stage, _, reason = chosen(option(1, "none", 1.0), option(3, "none", 0.9), stage=small_stage(zero_stage=3))
    assert (zero_stage, reason) == (
        1, "the fastest that fits without ZeRO 3, whose gathers are assumed to hide behind the computation",
    )  # fmt: skip


def test_smaller_micro_batches_are_recommended_if_nothing_fits_in_the_recipes(option: Options) -> None:
    found = (
        option(1, "none", None, None),
        option(1, "mbconv", None, 1),
        option(2, "mbconv", None, 2),
        option(3, "none", None, None),
    )
    result = recommend(STAGE, CLASSES, CLUSTER, found, 1000)
    assert result.fits
    assert (result.settings["zero_stage"], result.settings["activation_checkpointing"]) == (2, "mbconv")
    assert (result.settings["batch.micro_size"], result.stage.batch.micro_size) == (2, 2)
    assert result.reasons["batch.micro_size"] == (
        "the largest that fits: 2 in a step on each GPU; BatchNorm sees it, so it makes another run"
    )


def test_what_differs_from_the_recipe_is_a_change(option: Options) -> None:
    stage = small_stage(
        resources={"nodes": 2, "ranks": 4, "gpu_gigabytes": 80.0}, data={"train": "a", "validation": "b", "lanes": 4}
    )
    found = (option(1, "none", 1.0), option(2, "none", 1.0))
    assert recommend(stage, CLASSES, CLUSTER, found, 1000).changes == {}
    larger = find_cluster("h200", 8, 2)
    assert recommend(stage, CLASSES, larger, found, 1000).changes == {
        "resources.ranks": 8, "resources.nodes": 4, "resources.gpu_gigabytes": 141.0,
    }  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 6, 8, 16, 32])
@pytest.mark.parametrize(
    ("batch", "samples", "lanes"),
    [(96, 10_000, None), (96, 10_000, 3), (96, 40, 4), (4096, 10**7, None), (60, 1000, 20)],
)
def test_recommended_lanes_are_possible_and_no_two_nodes_share_one(
    nodes: int, batch: int, samples: int, lanes: int | None
) -> None:
    stage = small_stage(
        batch={"global_size": batch, "micro_size": 1}, data={"train": "a", "validation": "b", "lanes": lanes}
    )
    own = lanes or default_lanes(batch, samples)
    found = best_lanes(stage, nodes, samples)
    possible = [n for n in range(own, batch + 1) if batch % n == 0 and n % nodes == 0 and n <= samples]
    assert found == (None if own % nodes == 0 or not possible else min(possible))
    if found is not None:
        SampleOrder(shard_samples=np.array([samples]), seed=0, batch=batch, lanes=found, window=10)  # checks them
