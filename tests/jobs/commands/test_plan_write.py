"""`coatnet plan --write`: the recommended settings in a person's recipe, and nothing else."""

from pathlib import Path

import pytest
import yaml

from jobs.bundled_recipes import bundled_recipes
from pipeline.planner.hardware import find_cluster
from pipeline.planner.stage_memory import gpu_memory, with_micro_batch, with_settings
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from tests.support.command import coatnet

pytestmark = pytest.mark.slow(seconds=20)

SIZE = ("--samples", "4500", "--classes", "3")
RECIPE = """\
# what it is for
name: mine

stages:
  pretrain: # first
    resolution: 32
    steps: 40
    data: {train: shards/train, validation: shards/validation, lanes: 3} # few
    model: {name: coatnet_debug}
    batch:
      # as in the paper
      global_size: 12
      micro_size: 3
    precision: bf16
    optimizer: {peak_learning_rate: 1e-3} # tuned
    resources: {ranks: 2}
  finetune:
    resolution: 32
    steps: 40
    data: {train: shards/train, validation: shards/validation}
    model: {name: coatnet_debug}
    batch: {global_size: 12, micro_size: 3}
    optimizer: {peak_learning_rate: 1e-3}
"""
TWO_NODES = ("--gpus", "4", "--gpus-per-node", "2")
COMMENT = "# by coatnet plan for 4 x H100 of 80 GB, estimate"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def begin(recipe: Path) -> None:
    """Make it a stage that has begun."""
    run = recipe.parent / "runs" / "mine" / "pretrain"
    run.mkdir(parents=True)
    frozen = {"stage": "pretrain", "seed": 0, "task": "train", "index_digests": {}, "start_digest": None}
    (run / "recipe.yaml").write_text(yaml.safe_dump(frozen))


def test_the_recommended_settings_are_written_and_all_else_is_kept(recipe: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, *TWO_NODES, "--write")
    assert done.returncode == 0, done.stderr
    assert recipe.read_text() == RECIPE.replace("lanes: 3} # few", f"lanes: 4}} {COMMENT}").replace(
        "resources: {ranks: 2}", f"resources: {{ranks: 4, nodes: 2}} {COMMENT}"
    )
    assert (
        f"wrote to stage pretrain of {recipe}: resources.ranks: 4, resources.nodes: 2, data.lanes: 4\n" in done.stdout
    )
    assert (
        load_recipe(recipe).stages["pretrain"].resources.nodes,
        load_recipe(recipe).stages["pretrain"].data.lanes,
    ) == (2, 4)
    again = coatnet("plan", recipe, *SIZE, *TWO_NODES, "--write")
    assert again.returncode == 0
    assert f"nothing to write: stage pretrain of {recipe} has what is recommended\n" in again.stdout
    assert recipe.read_text().count(COMMENT) == 2


def test_what_was_planned_by_overrides_is_written_with_them(recipe: Path) -> None:
    done = coatnet("plan", recipe, "batch.micro_size=6", *SIZE, "--write", "--json")
    assert done.returncode == 0, done.stderr
    comment = "# by coatnet plan for 2 x H100 of 80 GB, estimate, with batch.micro_size=6"
    assert recipe.read_text() == RECIPE.replace("      micro_size: 3\n", f"      micro_size: 6 {comment}\n")
    assert f"wrote to stage pretrain of {recipe}: batch.micro_size: 6\n" in done.stderr


def test_a_stage_that_has_begun_keeps_what_would_make_it_another_run(recipe: Path) -> None:
    begin(recipe)
    done = coatnet("plan", recipe, "batch.micro_size=1", "precision=bf16_autocast", *SIZE, *TWO_NODES, "--write")
    assert done.returncode == 0, done.stderr
    comment = f"{COMMENT}, with batch.micro_size=1, precision=bf16_autocast"
    assert recipe.read_text() == RECIPE.replace("{ranks: 2}", f"{{ranks: 4, nodes: 2}} {comment}")
    for key, value in (("batch.micro_size", 1), ("data.lanes", 4), ("precision", "bf16_autocast")):
        assert f"not written: {key}={value}, since stage pretrain has begun and would be another run\n" in done.stdout


def test_nothing_is_written_if_nothing_fits(recipe: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, *TWO_NODES, "--gpu", "h100-1", "--write")
    assert done.returncode == 78
    assert f"--write: nothing was written to {recipe}, since not even one image of stage pretrain fits" in done.stderr
    assert recipe.read_text() == RECIPE


@pytest.mark.parametrize("name", ["demo", str(bundled_recipes()["demo"])])
def test_recipes_that_come_with_the_program_are_not_written(tmp_path: Path, name: str) -> None:
    before = bundled_recipes()["demo"].read_bytes()
    done = coatnet("plan", name, *SIZE, "--write", folder=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert "comes with the program and stays as it is; copy it: coatnet recipes copy demo" in done.stderr
    assert bundled_recipes()["demo"].read_bytes() == before


def test_a_recipe_that_cannot_be_edited_is_refused_before_a_step_is_traced(recipe: Path) -> None:
    text = "name: mine\nstages: {pretrain: {resolution: 32, steps: 40, data: {train: a, validation: a}, model: {name: coatnet_debug}, batch: {global_size: 4, micro_size: 2}, optimizer: {peak_learning_rate: 1e-3}}}\n"
    recipe.write_text(text)
    done = coatnet("plan", recipe, *SIZE, "--write")
    assert (done.returncode, done.stdout) == (78, "")
    assert "stage pretrain cannot be edited, since it is written in braces, or on one line" in done.stderr
    assert recipe.read_text() == text


def size_for_two_images(recipe: Path) -> str:
    """A GPU whose memory is enough for micro-batches of two images and not of three, which the recipe has."""
    stage = load_recipe(recipe).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    cluster = find_cluster("h100", 2, 2)
    # Between what the most economical settings, which need no buckets, take for three images and for two.
    stage = with_settings(stage, activation_checkpointing="every_block")
    three, two = (gpu_memory(with_micro_batch(stage, size), 3, cluster).needed for size in (3, 2))
    return f"h100-{(three + two) / 2e9:.9f}"


def test_a_smaller_micro_batch_is_written_if_the_recipes_does_not_fit(recipe: Path) -> None:
    size = size_for_two_images(recipe)
    done = coatnet("plan", recipe, *SIZE, "--gpu", size)
    assert done.returncode == 78
    assert "set what is recommended above, or plan other GPUs" in done.stderr
    assert "batch.micro_size=2  # the largest that fits: 3 in a step on each GPU" in done.stdout
    done = coatnet("plan", recipe, *SIZE, "--gpu", size, "--write")
    assert done.returncode == 0, done.stderr
    written = load_recipe(recipe).stages["pretrain"]
    assert isinstance(written, TrainStage)
    assert written.batch.micro_size == 2


def test_a_stage_that_has_begun_and_needs_a_smaller_micro_batch_is_left_as_it_is(recipe: Path) -> None:
    begin(recipe)
    size = size_for_two_images(recipe)
    done = coatnet("plan", recipe, *SIZE, "--gpu", size, "--write")
    assert done.returncode == 78
    assert "only a smaller micro-batch fits and stage pretrain has begun with its own" in done.stderr
    assert recipe.read_text() == RECIPE


def test_nothing_is_written_for_ranks_without_gpus(recipe: Path) -> None:
    done = coatnet("plan", recipe, "resources.gpus_per_rank=0", *SIZE, "--write")
    assert (done.returncode, done.stdout) == (78, "")
    assert "--write: the ranks of stage pretrain have no GPUs" in done.stderr
    assert recipe.read_text() == RECIPE
