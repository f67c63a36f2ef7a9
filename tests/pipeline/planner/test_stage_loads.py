"""What a stage asks of nodes and storage, against brute force."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data.order import SampleOrder
from pipeline.checkpoints.retention import reasons_to_keep
from pipeline.planner.datasets import PlannedDataset
from pipeline.planner.hardware import Cluster, find_cluster
from pipeline.planner.ranges import Range
from pipeline.planner.stage_loads import checkpoint_load, loader_load, shard_load
from pipeline.planner.step_estimate import StepEstimate, estimate_step, parameters_of
from tests.pipeline.planner.stages import CLASSES, small_stage

CLUSTER = find_cluster("h100", 4, 2)
DATASET = PlannedDataset(10_000, CLASSES, 10, Range(1e5, 5e4, 2e5), "made up")


@pytest.fixture(scope="module")
def step() -> StepEstimate:
    return estimate_step(small_stage(), CLASSES, CLUSTER)


def nodes(number: int) -> Cluster:
    return find_cluster("h100", number, 1)


def nodes_that_read_a_lane(nodes: int, lanes: int, batch: int) -> float:
    """By the samples of every position: each sample of a step is in the shard of its own lane."""
    order = SampleOrder(np.full(lanes, 100, np.int64), seed=0, batch=batch, lanes=lanes, window=10)
    per_node = batch // nodes
    readers: dict[int, set[int]] = {}
    for node in range(nodes):
        for shard in order.at(0, node * per_node, (node + 1) * per_node).shard.tolist():
            readers.setdefault(shard, set()).add(node)
    return sum(len(found) for found in readers.values()) / lanes


@pytest.mark.parametrize("batch", [24, 60, 64])
def test_the_nodes_that_share_a_lane_are_those_that_read_its_shards(step: StepEstimate, batch: int) -> None:
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    for number in divisors:
        for lanes in divisors:
            found = shard_load(DATASET, replace(step, images=batch), nodes(number), lanes).times_downloaded
            assert found == nodes_that_read_a_lane(number, lanes, batch), (number, lanes)


def test_downloads_are_those_of_every_image_by_every_node_that_shares_its_lane(step: StepEstimate) -> None:
    alone, shared = (shard_load(DATASET, step, CLUSTER, lanes) for lanes in (4, 1))
    images = step.images_per_second
    assert (alone.times_downloaded, shared.times_downloaded) == (1, 2)
    assert alone.bytes_per_second.value == pytest.approx(images.value * 1e5)
    assert alone.bytes_per_second.least == pytest.approx(images.least * 5e4)
    assert alone.bytes_per_second.most == pytest.approx(images.most * 2e5)
    assert shared.bytes_per_second.value == pytest.approx(2 * alone.bytes_per_second.value)
    assert alone.bytes_per_second_of_node.value == pytest.approx(alone.bytes_per_second.value / 2)
    # A shard of 1,000 images has 100 MB, which take one request; 200 MB take three ranges of 64 MiB.
    assert alone.requests_per_second.value == pytest.approx(images.value / 1000)
    assert alone.requests_per_second.least == pytest.approx(images.least / 1000)
    assert alone.requests_per_second.most == pytest.approx(3 * images.most / 1000)
    assert shared.requests_per_second.value == pytest.approx(2 * alone.requests_per_second.value)


def test_readers_are_busy_for_each_image_and_longer_for_remote_shards(step: StepEstimate) -> None:
    law = CLUSTER.law
    local = loader_load(small_stage(), step, CLUSTER)
    remote = loader_load(small_stage(data={"train": "s3://b/train", "validation": "s3://b/val"}), step, CLUSTER)
    each = step.images_per_second.value / 2
    assert local.images_per_second.value == pytest.approx(each)
    assert local.cores.value == pytest.approx(each * law.loader_milliseconds.value / 1e3)
    assert local.cores_per_gpu.value == pytest.approx(local.cores.value / 2)
    more = each * law.download_milliseconds.value / 1e3
    assert remote.cores.value - local.cores.value == pytest.approx(more)
    assert remote.cores.least < remote.cores.value < remote.cores.most


def load(step: StepEstimate, steps: int, every: int, **settings: Any) -> Any:
    stage = small_stage(checkpoint=settings)
    return stage, checkpoint_load(stage, CLASSES, steps, every, step, CLUSTER)


def kept_step_by_step(stage: Any, saved: list[int], top1: dict[int, float]) -> tuple[int, int]:
    """How many checkpoints are left at the end, and how many there were at most, if each save is followed by pruning."""
    held: list[int] = []
    most = 0
    for number in saved:
        held.append(number)
        most = max(most, len(held))
        known = {step: accuracy for step, accuracy in top1.items() if step <= number}
        held = [step for step, reasons in reasons_to_keep(held, stage.checkpoint, known).items() if reasons]
    return len(held), most


@pytest.mark.parametrize(("steps", "every"), [(100, 10), (95, 10), (7, 10), (64, 4)])
@pytest.mark.parametrize("keep_last", [1, 3])
@pytest.mark.parametrize("keep_every", [None, 20, 30])
@pytest.mark.parametrize("keep_best", [0, 1, 4])
def test_checkpoints_that_are_kept_are_those_that_pruning_leaves_at_most(
    step: StepEstimate, steps: int, every: int, keep_last: int, keep_every: int | None, keep_best: int
) -> None:
    stage, found = load(step, steps, every, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    saved = sorted({*range(every, steps + 1, every), steps})
    random = np.random.default_rng(0)
    accuracies = [random.permutation(len(saved)) for _ in range(50)]
    accuracies.append(-np.arange(len(saved)))  # always worse: the best ones are the oldest
    kept_every = np.array([keep_every is not None and number % keep_every == 0 for number in saved])
    accuracies.append(-np.arange(len(saved)) - 1000 * kept_every)  # and none of those that are kept anyway
    ends = [kept_step_by_step(stage, saved, dict(zip(saved, one.tolist(), strict=True))) for one in accuracies]
    assert found.saves == len(saved)
    assert found.kept == max(left for left, _ in ends)
    assert found.kept_bytes == found.kept * found.bytes
    assert max(most for _, most in ends) <= found.most_bytes // found.bytes <= min(found.kept + 1, len(saved))


def test_a_checkpoint_has_master_weights_moments_and_the_moving_average(step: StepEstimate) -> None:
    parameters = parameters_of(small_stage(), CLASSES)
    assert load(step, 100, 10)[1].bytes == 12 * parameters
    average = checkpoint_load(small_stage(ema_decay=0.9), CLASSES, 100, 10, step, CLUSTER)
    assert average.bytes == 16 * parameters


def test_saves_are_as_far_apart_as_their_steps_take(step: StepEstimate) -> None:
    _, found = load(step, 100, 10)
    assert (found.every_steps, found.between) == (10, step.seconds * 10)


def test_requests_do_not_depend_on_an_index_without_shards(step: StepEstimate) -> None:
    assert shard_load(replace(DATASET, shards=0), step, CLUSTER, 4).requests_per_second.value > 0
