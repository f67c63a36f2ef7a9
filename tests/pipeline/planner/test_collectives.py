"""Collectives of a step: which there are, against real engines, and how long they take."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import pytest

from models.registry import create_model
from pipeline.planner import collectives as module
from pipeline.planner.collectives import Collective, collective_seconds, collectives, communication_seconds
from pipeline.planner.hardware import Cluster, figure_range, find_cluster
from pipeline.planner.ranges import NOTHING, Range
from pipeline.recipe.schema import Precision
from pipeline.recipe.sections import CommunicationSettings
from tests.pipeline.planner.collectives_worker import CLASSES, MODEL, SIZE, WORLD
from tests.support.command import start_program

WORKER = Path(__file__).with_name("collectives_worker.py")
CASES = (
    "0-fp32-1-fp32", "0-fp32-2-fp32", "1-fp32-2-fp32", "2-fp32-2-fp32", "3-fp32-2-fp32",
    "1-bf16-1-fp32", "1-bf16-2-fp32", "2-bf16-1-fp32", "2-bf16-2-fp32", "3-bf16-1-fp32", "3-bf16-2-fp32",
    "1-bf16-2-bf16", "2-bf16-2-bf16", "3-bf16-2-bf16",
    "1-bf16_autocast-2-fp32", "2-bf16_autocast-2-fp32", "3-bf16_autocast-2-fp32",
    "3-bf16-2-fp32-500-1000000000", "3-fp32-1-fp32-0-1000000000",
)  # fmt: skip
"""As `collectives_worker.py` has them. By default all weights of the small model stay gathered with ZeRO 3."""
TOO_MANY = "3-bf16-2-fp32-0-1000"
PADDING = 16 * WORLD  # bytes: flat tensors are padded to multiples of the ranks


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bytes by case, kind of collective and micro-batch, of real engines."""
    folder = tmp_path_factory.mktemp("collectives")
    with open(folder / "output", "ab") as output:
        worker = start_program(WORKER, folder / "found.json", *CASES, TOO_MANY, output=output)
        assert worker.wait(300) == 0, (folder / "output").read_text()[-8000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def predicted(case: str) -> dict[str, dict[str, int]]:
    """The bytes of each kind in each micro-batch; what is sent once in a step is in the last one."""
    zero_stage, *rest = case.split("-")
    precision: Any
    gradients: Any
    precision, rounds, gradients, *limits = rest
    assert precision in get_args(Precision)
    sizes = [p.numel() for p in create_model(MODEL, num_classes=CLASSES, image_size=SIZE, device="meta").parameters()]
    persistent = sum(size for size in sizes if size <= (int(limits[0]) if limits else module.PERSISTENT))
    found: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    settings = CommunicationSettings(gradients=gradients)
    for one in collectives(sum(sizes), precision, int(zero_stage), int(rounds), settings, persistent):
        places = range(int(rounds)) if one.times > 1 else [int(rounds) - 1]
        for place in places:
            found[one.kind][str(place)] += one.bytes * one.times // len(places)
    return {kind: dict(places) for kind, places in found.items()}


OPERATORS = {"all_reduce": "allreduce_", "all_gather": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_"}


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("case", CASES)
def test_real_engines_send_the_same_bytes_in_the_same_micro_batches(counted: dict[str, Any], case: str) -> None:
    expected = {OPERATORS[kind]: places for kind, places in predicted(case).items()}
    found = counted[case]
    assert {kind: set(places) for kind, places in found.items()} == {k: set(places) for k, places in expected.items()}
    for kind, places in found.items():
        for place, size in places.items():
            assert 0 <= size - expected[kind][place] <= PADDING, (kind, place)


@pytest.mark.slow(seconds=20)
def test_weights_that_are_too_many_to_be_kept_are_gathered_for_each_pass(
    counted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LIVE", 1000)
    for place, size in counted[TOO_MANY]["_allgather_base_"].items():
        # The last layers of a forward are the first of its backward.
        assert 0.95 < size / predicted(TOO_MANY)["all_gather"][place] <= 1


def cluster(gpus: int, per_node: int = 8) -> Cluster:
    """H100 with a link and a network of round numbers."""
    return find_cluster("h100", gpus, per_node, link=100e9, network=10e9)


def test_a_ring_within_a_node_passes_each_byte_almost_twice() -> None:
    law = cluster(8).law
    one = Collective("all_reduce", "gradients", 8_000_000_000, 1, False)
    moving = 2 * 7 / 8 * 8e9 / (100e9 * law.link_share.value)
    hops = 2 * 7 * law.link_latency.value
    assert collective_seconds(one, cluster(8)).value == pytest.approx(moving + hops, rel=1e-12)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_a_gather_and_a_scatter_pass_each_byte_almost_once(kind: Any) -> None:
    one = Collective(kind, "weights", 8_000_000_000, 3, False)
    law = cluster(4).law
    once = 3 / 4 * 8e9 / (100e9 * law.link_share.value) + 3 * law.link_latency.value
    assert collective_seconds(one, cluster(4)).value == pytest.approx(3 * once, rel=1e-12)


def test_between_nodes_the_network_cards_of_a_node_count_together_and_hops_are_those_of_a_tree() -> None:
    nodes = cluster(32)
    law = nodes.law
    one = Collective("all_reduce", "gradients", 8_000_000_000, 1, False)
    moving = 2 * 31 / 32 * 8e9 / (8 * 10e9 * law.network_share.value)  # slower than the link
    hops = 2 * (7 * law.link_latency.value + 2 * law.network_latency.value)  # 4 nodes are a tree of two levels
    assert collective_seconds(one, nodes).value == pytest.approx(moving + hops, rel=1e-12)


def test_a_network_that_is_faster_than_the_link_does_not_help() -> None:
    slow_link = find_cluster("h100", 16, 8, link=10e9, network=100e9)
    alone = find_cluster("h100", 8, 8, link=10e9)
    assert slow_link.bus == alone.bus


def test_ends_of_the_range_are_those_of_bandwidth_and_latency() -> None:
    law = cluster(2).law
    one = Collective("all_gather", "weights", 1_000_000, 1, False)
    found = collective_seconds(one, cluster(2))
    shares, hops = figure_range(law.link_share), figure_range(law.link_latency)
    assert found.least == pytest.approx(0.5e6 / (100e9 * shares.most) + hops.least, rel=1e-12)
    assert found.most == pytest.approx(0.5e6 / (100e9 * shares.least) + hops.most, rel=1e-12)


def test_one_gpu_exchanges_nothing() -> None:
    one = Collective("all_reduce", "gradients", 10**9, 4, False)
    assert collective_seconds(one, cluster(1)) == NOTHING


def test_what_runs_during_the_backward_is_exposed_as_far_as_that_is_shorter() -> None:
    hidden = Collective("all_reduce", "gradients", 10**9, 2, True)
    alone = Collective("all_gather", "weights", 10**9, 1, False)
    seconds = {one: collective_seconds(one, cluster(8)) for one in (hidden, alone)}
    for computing in (0.0, 0.01, 10.0):
        found = communication_seconds((hidden, alone), cluster(8), Range.exactly(computing))
        assert found.total == seconds[hidden] + seconds[alone]
        assert found.each == (seconds[hidden], seconds[alone])
        left = max(0.0, seconds[hidden].value - computing)
        assert found.exposed.value == pytest.approx(seconds[alone].value + left, rel=1e-12)


def test_buckets_of_bf16_weights_with_zero_1_are_summed_when_all_gradients_are_there() -> None:
    settings = CommunicationSettings(overlap=True)
    cases: tuple[tuple[Precision, int], ...] = (("bf16", 1), ("fp32", 1), ("bf16", 2), ("fp32", 0))
    hidden = {case: collectives(1000, *case, 1, settings)[0].during_backward for case in cases}
    assert hidden == {("bf16", 1): False, ("fp32", 1): True, ("bf16", 2): True, ("fp32", 0): False}


def test_zero_3_overlaps_unless_the_recipe_forbids_it() -> None:
    hidden = {
        overlap: [
            one.during_backward for one in collectives(1000, "bf16", 3, 1, CommunicationSettings(overlap=overlap))
        ]
        for overlap in (None, True, False)
    }
    assert hidden == {None: [True, True], True: [True, True], False: [False, False]}
