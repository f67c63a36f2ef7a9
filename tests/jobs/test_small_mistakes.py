"""Small mistakes that must be named: in the environment, in names of runs, in overrides, in files of a run."""

import json
from pathlib import Path

import pytest

from jobs.run_discovery import find_runs
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe
from tests.support.command import coatnet
from tests.support.recipes import write_recipe


@pytest.mark.slow
def test_a_debug_level_that_torch_does_not_know_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    done = coatnet("models", fresh=True, TORCH_DISTRIBUTED_DEBUG="verbose")
    assert (done.returncode, done.stderr) == (
        78,
        "error: TORCH_DISTRIBUTED_DEBUG=verbose in the environment: torch takes OFF, INFO or DETAIL; correct it, or "
        "unset it\n",
    )
    assert coatnet("models", "--help", fresh=True, TORCH_DISTRIBUTED_DEBUG="detail").returncode == 0


@pytest.mark.parametrize("name", ["a/b", "..", "/etc"])
def test_a_sweep_cannot_name_runs_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "base.sweep.json").write_text(json.dumps({"runs": [name], "settings": {}}))
    with pytest.raises(ConfigError, match="is not the name of a folder"):
        find_runs(tmp_path / "base.sweep.json")


@pytest.mark.parametrize("path", ["/", "/.sweep.json"])
def test_paths_without_a_name_are_no_runs(path: str) -> None:
    with pytest.raises(ConfigError, match="not a r"):
        find_runs(Path(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "nosuch.steps=3",
            "has no stage or section nosuch; stages: pretrain, finetune, evaluate; sections: data, model, ",
        ),
        ("pretrian.steps=3", "has no stage or section pretrian; did you mean pretrain?"),
        ("optimiser.weight_decay=3", "has no stage or section optimiser; did you mean optimizer?"),
        ("stpes=3", "unknown key stpes; did you mean steps?"),
    ],
)
def test_the_first_key_of_an_override_is_looked_for_among_what_can_stand_there(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(write_recipe(tmp_path, tmp_path), [override])
    assert message in str(refused.value)


def test_a_dry_run_without_slurm_prints_the_jobs_and_says_that_slurm_was_not_asked(
    shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    done = coatnet("submit", recipe, "--dry-run", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" sbatch --parsable ") == 3
    assert done.stderr.startswith(
        "warning: Slurm is not on this machine, so it was not asked whether it would take these jobs\n"
    )
    refused = coatnet("submit", recipe, PATH="/nowhere")
    assert refused.returncode == 78
    assert "Slurm is not on this machine" in refused.stderr
    wrong = coatnet("submit", recipe, "--dry-run", "resources.ranks=3", PATH="/nowhere")
    assert (wrong.returncode, wrong.stdout) == (78, "")
    assert "3 ranks do not divide the 4 micro-batches" in wrong.stderr
