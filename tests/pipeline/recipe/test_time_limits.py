"""Time limits as people write them for Slurm."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe
from tests.pipeline.recipe.test_recipe import RECIPE, write

HOUR = 3600


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("12:00:00", 12 * HOUR),
        ('"12:00:00"', 12 * HOUR),
        ("0:30:00", HOUR / 2),
        ("100:00:00", 100 * HOUR),
        ("90", 1.5 * HOUR),
        ("1:30", 90),
        ("90:00", 1.5 * HOUR),
        ("2-00", 48 * HOUR),
        ("2-12", 60 * HOUR),
        ("1-12:30", 36.5 * HOUR),
        ("1-00:00:30", 24 * HOUR + 30),
    ],
)
def test_a_time_limit_is_what_sbatch_takes_it_for(tmp_path: Path, written: str, seconds: float) -> None:
    text = RECIPE.replace("    epochs: 2", f"    epochs: 2\n    resources: {{time_limit: {written}}}")
    for recipe in (
        load_recipe(write(tmp_path, text)),
        load_recipe(write(tmp_path), [f"resources.time_limit={written}"]),
    ):
        resources = recipe.stages["pretrain"].resources
        assert resources.time_limit == written.strip('"')
        assert resources.time_limit_seconds == seconds


@pytest.mark.parametrize(
    "written", ["12h", "1.5", "10:70:00", "1:5:00", "1:2:3:4", "1-", "-1", "UNLIMITED", "0", "0:00"]
)
def test_other_times_are_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(ConfigError, match=r"pretrain.resources.time_limit: '.*' is (not a|no) time; "):
        load_recipe(write(tmp_path), [f"resources.time_limit={written}"])
