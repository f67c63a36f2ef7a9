"""The recipe of a run, frozen when it starts: read back the same, never replaced, and not to be edited."""

import re
from pathlib import Path

import pytest

from jobs.bundled_recipes import bundled_recipes, load_recipe
from jobs.frozen_recipe import frozen_recipe
from jobs.scheduler.chain_jobs import chain_jobs
from jobs.scheduler.submissions import submission_folder
from pipeline.errors import ConfigError
from pipeline.plan import plan_stage
from pipeline.runs.run_folder import run_folder
from pipeline.runs.stage_settings import checked_data, refuse_other_data
from tests.support.recipes import write_recipe
from tests.support.records import stage_result


@pytest.fixture
def path(tmp_path: Path, shards: Path) -> Path:
    return write_recipe(tmp_path, shards)


@pytest.mark.parametrize("name", bundled_recipes())
def test_a_frozen_recipe_is_read_back_the_same(tmp_path: Path, name: str) -> None:
    frozen = frozen_recipe(load_recipe(bundled_recipes()[name], [f"runs={tmp_path}"]))
    frozen.write()
    assert load_recipe(frozen.path) == frozen.recipe
    assert frozen_recipe(load_recipe(frozen.path)).path == frozen.path


def test_text_that_looks_like_a_number_stays_text(path: Path) -> None:
    path.write_text(
        path.read_text().replace("  finetune:", "  '010':").replace("start_from: finetune", "start_from: '010'")
    )
    frozen = frozen_recipe(load_recipe(path, ['name="1e-3"', 'resources.account="2024_01"', 'resources.qos="yes"']))
    frozen.write()
    assert load_recipe(frozen.path) == frozen.recipe
    assert list(frozen.recipe.stages) == ["pretrain", "010", "evaluate"]


def test_recipes_that_differ_are_frozen_side_by_side(path: Path) -> None:
    one, other = (frozen_recipe(load_recipe(path, [f"log.every_steps={steps}"])) for steps in (1, 2))
    one.write()
    before = one.path.read_bytes()
    other.write()
    assert one.path.read_bytes() == before
    assert load_recipe(other.path).stages["pretrain"].log.every_steps == 2


def test_an_edited_frozen_recipe_is_refused_with_both_digests(path: Path) -> None:
    frozen = frozen_recipe(load_recipe(path))
    frozen.write()
    frozen.path.write_text(frozen.path.read_text().replace("steps: 40", "steps: 41"))
    with pytest.raises(ConfigError) as refused:
        load_recipe(frozen.path)
    found = re.search(r"changed since the run started with it \(digest (\w+) instead of (\w+)\)", str(refused.value))
    assert found is not None
    assert found[2] == frozen.path.stem != found[1]
    frozen.write()  # the same recipe again
    assert load_recipe(frozen.path) == frozen.recipe


def test_label_maps_are_frozen_with_the_recipe(path: Path) -> None:
    label_map = path.with_name("map.yaml")
    label_map.write_text("rename: {dark: night}")
    maps = ["data.label_map=map.yaml", "data.validation_label_map=map.yaml"]
    frozen = frozen_recipe(load_recipe(path, maps))
    frozen.write()
    label_map.write_text("rename: {dark: day}")
    plan = plan_stage(load_recipe(frozen.path), "pretrain")
    assert plan.classes == ("bright", "night", "striped")
    assert frozen_recipe(load_recipe(frozen.path)).path == frozen.path  # a copy is not copied again
    assert frozen_recipe(load_recipe(path, maps)).path != frozen.path


def test_ranks_refuse_data_that_was_not_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_stage(load_recipe(path), "pretrain")
    for name, value in checked_data(plan).items():
        monkeypatch.setenv(name, value)
    refuse_other_data(plan)
    path.with_name("map.yaml").write_text("rename: {dark: night}")
    maps = ["data.label_map=map.yaml", "data.validation_label_map=map.yaml"]
    with pytest.raises(
        ConfigError, match=r"data.train: the shards have changed since .* \(digest \w+ instead of \w+\)"
    ):
        refuse_other_data(plan_stage(load_recipe(path, maps), "pretrain"))


def test_a_job_is_not_left_out_for_the_result_of_other_settings(path: Path) -> None:
    recipe = load_recipe(path)
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.freeze(plan_stage(recipe, "pretrain"), None)
    folder.finish(stage_result("pretrain/checkpoints/step-00000040", "pretrain", steps=40))
    submissions = submission_folder(recipe)
    assert [job.done for job in chain_jobs(recipe, submissions, (recipe, submissions))] == [True, False, False]
    changed = load_recipe(path, ["pretrain.steps=50", "pretrain.log.every_steps=7"])
    with pytest.raises(ConfigError, match=r"holds a run with other settings:\n  steps: 40 -> 50\n"):
        chain_jobs(changed, submissions, (changed, submissions))
