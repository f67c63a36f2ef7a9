"""Ranks that compute wrong values, in real runs of one to four ranks: who is named, what is recorded, what is applied."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.host import processor_name
from tests.pipeline.cross_check.wrong_values_worker import BLOCK, CASES, HEAD
from tests.support.ranks import run_ranks
from tests.support.recipes import checkpoint_bytes, events, write_recipe

pytestmark = pytest.mark.slow(seconds=20)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases of the worker, in a folder for each number of ranks."""
    folder = tmp_path_factory.mktemp("wrong_values")
    for world in CASES:
        worker = Path(__file__).with_name("wrong_values_worker.py")
        run_ranks(world, worker, write_recipe(folder / str(world), shards), folder / str(world))
    return folder


def failures(run: Path, start: int = 0) -> list[Any]:
    """What the ranks of a start raised: exit code, nodes and message."""
    return [json.loads(path.read_text()) for path in sorted(run.glob(f"failed-{start}-*"))]


def faults(run: Path) -> list[dict[str, Any]]:
    """The recorded ones."""
    return [entry for entry in events(run) if entry["event"] == "machine_faulty"]


def of_block(parameter: str) -> str:
    block = parameter.partition(".")[0] if parameter == HEAD else "blocks.0"
    return f"gradient of {block}"


NAMED = [
    (1, "own", 0, of_block(BLOCK)),
    (2, "own", 1, of_block(BLOCK)),
    (2, "neighbours", 1, of_block(BLOCK)),
    (3, "own", 1, of_block(BLOCK)),
    (3, "neighbours", 1, of_block(BLOCK)),
    (3, "loss", 2, "loss"),
    (3, "statistics", 0, "BatchNorm statistics"),
    (4, "always", 2, of_block(HEAD)),
]


@pytest.mark.parametrize(("world", "case", "rank", "value"), NAMED)
def test_the_rank_that_is_wrong_is_named_and_all_ranks_end_with_its_node(
    runs: Path, world: int, case: str, rank: int, value: str
) -> None:
    run = runs / str(world) / case
    raised = failures(run)
    assert len(raised) == world
    assert all(one == raised[0] for one in raised)
    code, nodes, message = raised[0]
    assert (code, nodes) == (71, [f"node-{rank}"])
    assert f": rank {rank} on node-{rank} ({processor_name()}): {value}. " in message
    (entry,) = faults(run)
    device = {"rank": rank, "node": f"node-{rank}", "device": processor_name(), "uuid": None, "values": [value]}
    kind = {"loss": "loss", "BatchNorm statistics": "statistics"}.get(value, "gradient")
    facts = {"step": 2, "kinds": [kind], "nodes": nodes, "devices": [device], "last_passed": 1}
    assert facts.items() <= entry.items()


@pytest.mark.parametrize(("world", "case", "rank", "value"), NAMED)
def test_the_step_is_not_applied(runs: Path, world: int, case: str, rank: int, value: str) -> None:
    """The newest checkpoint of that start is that of the step before, of an undisturbed run."""
    run, undisturbed = runs / str(world) / case, runs / str(world) / "undisturbed"
    saved = [entry["step"] for entry in events(run) if entry["event"] == "save"]
    assert saved[:1] == [1]
    assert (saved[1:] == []) == (len(CASES[world][case]) == 1)
    first = "checkpoints/step-00000001"
    assert checkpoint_bytes(run / first) == checkpoint_bytes(undisturbed / first)
    assert (
        "The step was not applied, and the run goes on from step-00000001, after which the check of step 1 was passed"
        in (failures(run)[0][2])
    )


@pytest.mark.parametrize("world", [2, 4])
def test_the_next_start_goes_on_to_the_weights_of_an_undisturbed_run(runs: Path, world: int) -> None:
    run, undisturbed = runs / str(world) / "always", runs / str(world) / "undisturbed"
    assert not failures(run, start=1)
    assert [entry["step"] for entry in events(run) if entry["event"] == "resume"] == [1]
    last = "checkpoints/step-00000003"
    assert checkpoint_bytes(run / last) == checkpoint_bytes(undisturbed / last)


def test_two_ranks_cannot_tell_whose_lasting_fault_it_is_and_no_node_is_named(runs: Path) -> None:
    code, nodes, message = failures(runs / "2/always")[0]
    assert (code, nodes) == (71, [])
    assert "cannot be told which are wrong, since each had its own a second time: rank 0 on node-0 " in message
    assert "; rank 1 on node-1 " in message
    assert "go on with three ranks or more" in message
    (entry,) = faults(runs / "2/always")
    assert (entry["nodes"], [device["rank"] for device in entry["devices"]]) == ([], [0, 1])


def test_both_of_two_ranks_are_not_taken_for_broken_at_once(runs: Path) -> None:
    code, nodes, message = failures(runs / "2/both")[0]
    assert (code, nodes) == (71, [])
    assert "more than half of the ranks" in message
    assert "leave verify.every_steps out and report this" in message


def test_three_ranks_that_all_differ_are_no_majority(runs: Path) -> None:
    code, nodes, message = failures(runs / "3/undecided")[0]
    assert (code, nodes) == (71, [])
    assert "since no majority of the ranks has either: rank 0 on node-0 " in message


def test_a_run_that_would_leave_out_more_nodes_than_it_may_fails_for_good(runs: Path) -> None:
    """A node that is found again counts once."""
    run = runs / "3/limit"
    codes = [failures(run, start)[0][0] for start in range(3)]
    assert codes == [71, 71, 70]
    message = failures(run, start=2)[0][2]
    assert "With node-2, this run would leave out 2 nodes, and verify.excluded_nodes allows 1; look at the" in message
    assert "the run starts over, as there is no checkpoint yet" in message
    assert [entry["nodes"] for entry in faults(run)] == [["node-1"], ["node-1"], ["node-2"]]
    assert [entry["last_passed"] for entry in faults(run)] == [None] * 3


def test_one_rank_that_computes_the_same_twice_passes(runs: Path) -> None:
    assert not faults(runs / "1/none")
    last = "checkpoints/step-00000003"
    assert checkpoint_bytes(runs / "1/none" / last) == checkpoint_bytes(runs / "1/undisturbed" / last)
