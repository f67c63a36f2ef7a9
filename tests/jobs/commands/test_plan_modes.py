"""`coatnet plan --failures` and `--rehearse`: what they show and when they fail."""

import json
from pathlib import Path

import pytest

from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow(seconds=12)

SIZE = ("--samples", "4500", "--classes", "3")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of shards that do not exist."""
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, folder / "shards", precision="bf16")


def test_failures_are_those_of_the_step_node_and_save_that_were_named(recipe: Path) -> None:
    named = ("--failures", "--gpus", "4", "--gpus-per-node", "2", "--node", "1", "--at-step", "12", "--during-save")
    done = coatnet("plan", recipe, *SIZE, *named, "--node-hours", "100", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["run"]["interval"] == 5
    assert report["node_hours"] == 100
    node, *_ = report["outcomes"]
    assert (node["ranks"], node["step"], node["in_flight"]["step"]) == ([2, 4], 12, 10)
    assert (node["continues_from"], node["lost_steps"], node["lost_samples"]) == (5, 7, 7 * 12)
    shown = coatnet("plan", recipe, *SIZE, *named)
    assert "the save of step 10 is in flight" in shown.stdout
    assert "node 1 dies, ranks 2 to 3" in shown.stdout


def test_a_node_that_is_not_there_is_refused(recipe: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, "--failures", "--gpus", "4", "--node", "3")
    assert done.returncode == 78
    assert "node 3: the run has 1" in done.stderr


def test_a_rehearsal_has_the_ranks_that_were_named_and_every_element_once(recipe: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, "--rehearse", "--world", "4", "--rank", "1", "--reshape-to", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["rank"] for one in found["rehearsed"]] == [0, 1, 2, 3]
    assert found["consistency"]["engines_as_computed"] == 4
    assert set(found["consistency"]["elements_owned_once"].values()) == {found["parameters"]}
    assert (found["data"]["assumed"], found["data"]["samples"]) == (True, 4500)


def test_a_rehearsal_of_a_job_that_would_not_run_fails_with_the_message_of_its_start(recipe: Path) -> None:
    refused = "3 ranks do not divide the 4 micro-batches of a step"
    done = coatnet("plan", recipe, *SIZE, "--rehearse", "--world", "3")
    assert (done.returncode, refused in done.stderr) == (78, True)
    done = coatnet("plan", recipe, *SIZE, "--rehearse", "--world", "4", "--reshape-to", "3")
    assert done.returncode == 78
    assert "the job would not run: " in done.stderr
    assert refused in done.stderr


def test_options_of_a_rehearsal_alone_are_refused(recipe: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, "--world", "4")
    assert done.returncode == 78
    assert "--world: of no effect without --rehearse" in done.stderr


def test_the_size_of_a_dataset_that_is_there_cannot_be_named_for_a_rehearsal(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, precision="bf16")
    done = coatnet("plan", recipe, *SIZE, "--rehearse")
    assert (done.returncode, done.stdout) == (78, "")
    assert "--samples, --classes: of no effect on a rehearsal, which uses" in done.stderr
