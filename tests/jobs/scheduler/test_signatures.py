"""Signed web addresses in what a submission writes for people: a job must read the recipe, and nobody else needs them."""

from pathlib import Path

from jobs.bundled_recipes import load_recipe
from jobs.frozen_recipe import frozen_recipe
from jobs.scheduler.submissions import SubmissionFolder
from jobs.sweep import record, variations
from tests.support.recipes import write_recipe

SIGNED = "https://host/shards?sig=S3CRET&expires=é" + "x" * 200


def test_the_recipe_as_submitted_has_no_signature_and_the_one_that_jobs_read_has(tmp_path: Path, shards: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards), [f'data.train="{SIGNED}"'])
    folder = SubmissionFolder(tmp_path / "slurm")
    folder.path.mkdir()
    folder.freeze(recipe)
    text = folder.recipe.read_text()
    assert "S3CRET" not in text
    assert "https://host/shards?..." in text
    frozen = frozen_recipe(recipe)
    frozen.write()
    assert load_recipe(frozen.path) == frozen.recipe


def test_the_record_of_a_sweep_and_the_names_of_its_runs_have_no_signature(tmp_path: Path) -> None:
    found = variations("own", [f"data.train={SIGNED},https://host/shards?sig=OTHERS3CRET"])
    record(tmp_path / "own.sweep.json", found)
    text = (tmp_path / "own.sweep.json").read_text()
    assert [one.name for one in found] == ["own-train-https_host_shards_...", "own-train-https_host_shards_...-1"]
    assert "S3CRET" not in text
    assert text.count("https://host/shards?...") == 2
    assert [f"data.train={SIGNED}", "data.train=https://host/shards?sig=OTHERS3CRET"] == [
        one.overrides[1] for one in found
    ]
