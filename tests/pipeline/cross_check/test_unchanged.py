"""Checks change nothing: with them and without, a run has the same bits, in every precision and ZeRO stage."""

from pathlib import Path

import pytest

from tests.pipeline.cross_check.unchanged_worker import CASES
from tests.support.ranks import run_ranks
from tests.support.recipes import checkpoint_bytes, curves, write_recipe

pytestmark = pytest.mark.slow(seconds=15)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases of the worker, run on two ranks."""
    folder = tmp_path_factory.mktemp("unchanged")
    worker = Path(__file__).with_name("unchanged_worker.py")
    run_ranks(2, worker, write_recipe(folder, shards), folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_checks_has_the_bits_of_one_without(runs: Path, name: str) -> None:
    """And each check was passed: two ranks had equal bits of what one of them computed in its step."""
    with_checks, without = curves(runs / f"{name}-checked"), curves(runs / name)
    assert with_checks["verify/passed"] == {1: 1.0, 2: 2.0, 3: 3.0}
    assert "verify/passed" not in without
    for tag in ("train/loss", "train/gradient_norm", "validation/loss"):
        assert with_checks[tag] == without[tag]
    last = "checkpoints/step-00000003"
    assert checkpoint_bytes(runs / f"{name}-checked" / last) == checkpoint_bytes(runs / name / last)


def test_steps_that_were_checked_are_in_no_measured_time(runs: Path) -> None:
    assert "train/images_per_second" in curves(runs / "zero2")
    found = curves(runs / "zero2-checked")  # every step was checked
    assert not [tag for tag in found if tag == "train/images_per_second" or tag.startswith("wall_time/step")]
    assert list(found["verify/seconds"]) == list(found["verify/share_of_step"]) == [1, 2, 3]
    assert all(seconds > 0 for seconds in found["verify/seconds"].values())
