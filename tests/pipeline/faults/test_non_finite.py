"""Non-finite steps are not applied, their samples are logged, and too many of them end the run or roll it back."""

import math
from pathlib import Path

import pytest

from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from tests.support.ranks import run_ranks
from tests.support.recipes import checkpoint_bytes, curves, events, scalars, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases of the worker, run on two ranks."""
    folder = tmp_path_factory.mktemp("non_finite")
    worker = Path(__file__).with_name("non_finite_worker.py")
    run_ranks(2, worker, write_recipe(folder, shards, ema_decay=0.9), folder)
    return folder


def state(run: Path, step: int) -> dict[str, bytes]:
    files = checkpoint_bytes(run / f"checkpoints/step-{step:08d}")
    return {name: data for name, data in files.items() if name != "manifest.json"}


def test_a_non_finite_step_changes_nothing_and_the_run_continues(runs: Path) -> None:
    run = runs / "last"
    assert state(run, 10) == state(run, 9) != state(run, 6)
    losses = scalars(run, "train/loss")
    assert list(losses) == list(range(1, 11))
    assert [step for step, loss in losses.items() if not math.isfinite(loss)] == [10]
    assert (run / "result.json").exists()


def test_the_event_log_names_the_samples_of_the_non_finite_micro_batch(runs: Path) -> None:
    plan = plan_stage(load_recipe(runs / "recipe.yaml"), "pretrain", 2)
    assert isinstance(plan, TrainPlan)
    (entry,) = [entry for entry in events(runs / "last") if entry["event"] == "not_finite"]
    assert (entry["step"], entry["rank"], entry["loss"]) == (10, 1, "nan")
    named = plan.order.at(9, 6, 9)  # the third micro-batch of three samples
    shards = [plan.train.index.shards[shard].name for shard in named.shard]
    (samples,) = entry["samples_of_micro_batches"].values()
    assert list(entry["samples_of_micro_batches"]) == ["2"]
    assert [sample.split("/")[0] for sample in samples] == shards


def test_too_many_in_a_row_end_the_run_on_all_ranks_with_a_fix(runs: Path) -> None:
    for rank in (0, 1):
        message = (runs / "too_many" / f"failed-{rank}").read_text()
        assert "3 steps in a row, from step 5 on, is not finite" in message
        assert "non_finite.roll_backs" in message
    # No save in between: it would hold the weights that led there.
    assert sorted(path.name for path in (runs / "too_many/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_roll_back_continues_after_the_data_with_the_weights_from_before(runs: Path) -> None:
    run = runs / "rolled_back"
    (entry,) = [entry for entry in events(run) if entry["event"] == "roll_back"]
    assert (entry["to"], entry["step"]) == (4, 8)
    assert state(run, 8) == state(run, 4)
    assert (run / "result.json").exists()


def test_the_number_of_roll_backs_is_limited(runs: Path) -> None:
    names = [entry["event"] for entry in events(runs / "again")]
    assert names.count("roll_back") == 1
    assert "3 steps in a row, from step 8 on, is not finite" in (runs / "again" / "failed-0").read_text()


def test_a_second_roll_back_passes_over_the_weights_that_led_to_the_first(runs: Path) -> None:
    run = runs / "twice"
    # After step 6 there was a checkpoint, which the first series made useless; the second one begins in step 10.
    returns = [(entry["to"], entry["step"]) for entry in events(run) if entry["event"] == "roll_back"]
    assert returns == [(4, 9), (4, 12)]
    assert (run / "result.json").exists()


def test_a_run_that_is_stopped_between_non_finite_steps_equals_the_undisturbed_one(runs: Path) -> None:
    stopped, undisturbed = runs / "twice_stopped", runs / "twice"
    entries = [entry for entry in events(stopped) if entry["event"] in ("stop", "roll_back")]
    assert [(entry["event"], entry["step"]) for entry in entries] == [
        ("stop", 5), ("stop", 7), ("stop", 8), ("roll_back", 9), ("stop", 11), ("roll_back", 12),
    ]  # fmt: skip
    # Neither has the stop of step 5 left a newer checkpoint to return to, nor have the others displaced that of step 4.
    assert [entry["to"] for entry in entries if entry["event"] == "roll_back"] == [4, 4]
    ours, others = curves(stopped), curves(undisturbed)
    for tag in ("train/gradient_norm", "train/steps_not_applied", "validation/loss"):
        assert str(ours[tag]) == str(others[tag]), tag
    assert others["train/steps_not_applied"][14] == 6
    for step in (12, 14):
        name = f"checkpoints/step-{step:08d}"
        assert checkpoint_bytes(stopped / name) == checkpoint_bytes(undisturbed / name)
