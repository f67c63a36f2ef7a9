"""Stops at a bad moment: during an evaluation, which the next start repeats to the same bits, and during a save. An
evaluation that fails on one rank ends all of them.
"""

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.recipes import checkpoint_bytes, curves, events, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run and of the one that was stopped twice; both have a moving average."""
    folder = tmp_path_factory.mktemp("stopped_evaluation")
    recipe = write_recipe(folder, shards, ema_decay=0.9)
    run_ranks(2, Path(__file__).with_name("stopped_evaluation_worker.py"), recipe, folder, seconds=120)
    return folder


def test_all_ranks_save_and_stop_whichever_received_the_signal(runs: Path) -> None:
    for step in (4, 8):
        for rank in (0, 1):
            message = (runs / "stopped" / f"stop-{step}-{rank}").read_text()
            assert (
                message
                == f"stopped by SIGTERM after step {step}, saved as step-{step:08d} in {runs}/stopped/checkpoints"
            )


def test_the_evaluation_is_repeated_and_everything_equals_the_undisturbed_run(runs: Path) -> None:
    entries = [entry for entry in events(runs / "stopped") if entry["event"] in ("stop", "evaluation", "resume")]
    assert [(entry["event"], entry["step"]) for entry in entries] == [
        ("stop", 4), ("resume", 4), ("evaluation", 4), ("stop", 8), ("resume", 8), ("evaluation", 8),
    ]  # fmt: skip
    ours, others = curves(runs / "stopped"), curves(runs / "undisturbed")
    for tag in ("train/loss", "train/gradient_norm", "validation/loss", "validation/top1"):
        assert ours[tag] == others[tag]
    final = "checkpoints/step-00000008"
    assert checkpoint_bytes(runs / "stopped" / final) == checkpoint_bytes(runs / "undisturbed" / final)


def test_an_error_of_one_rank_ends_an_evaluation_of_the_average_instead_of_hanging(runs: Path) -> None:
    """It must not wait for the others to exchange the averages back, while they wait for it to sum their counts."""
    assert (runs / "failed/failed-1").read_text() == "DataError: too many samples of rank 1 cannot be used"
    assert (runs / "failed/failed-0").read_text().startswith("LostRank: rank 0 lost another rank")


@pytest.mark.parametrize(
    ("name", "steps", "saved"),
    [
        ("in_time", [2, 3], "saved as step-00000003 in {}"),
        ("late", [2], "which was not saved for lack of time; the newest checkpoint is step-00000002 in {}"),
    ],
)
def test_a_save_in_flight_is_finished_first_and_the_last_step_is_saved_if_there_is_time(
    runs: Path, name: str, steps: list[int], saved: str
) -> None:
    assert sorted(path.name for path in (runs / name / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in steps]
    for rank in (0, 1):
        said = saved.format(runs / name / "checkpoints")
        assert (runs / name / f"stop-{rank}").read_text() == (
            f"stopped by SIGTERM after step 3, {said}; the same command continues from the last checkpoint"
        )
    stop = events(runs / name)[-1]
    assert (stop["event"], stop["step"], stop["checkpoint"]) == ("stop", 3, f"step-{steps[-1]:08d}")
