"""Commands whose ranks compute wrong values: how they end, and how the same command goes on when the fault is gone."""

import socket
from pathlib import Path

import pytest

from tests.support.command import coatnet
from tests.support.recipes import checkpoint_bytes, curves, events, write_recipe
from tests.support.wrong_values import Fault

pytestmark = pytest.mark.slow(seconds=30)
NODE = socket.gethostname()
MODULE = "tests.support.wrong_values"
SETTINGS = (
    "pretrain.steps=6", "pretrain.optimizer.warmup_steps=1", "pretrain.checkpoint.every_steps=1", "pretrain.checkpoint.keep_last=9",
)  # fmt: skip
ROUNDS = 2  # micro-batches of each of two ranks


def test_a_start_that_finds_a_wrong_rank_ends_with_71_and_the_same_command_continues(
    shards: Path, tmp_path: Path
) -> None:
    recipe, undisturbed = write_recipe(tmp_path / "faulty", shards), write_recipe(tmp_path / "undisturbed", shards)
    # Steps 1 and 4 are checked, and rank 1 flips a bit in its first micro-batch of step 4.
    number = (1 + 3 * ROUNDS) + 1
    fault = Fault(1, "head.classifier.weight", number, number)
    found = coatnet(
        "run", recipe, *SETTINGS, "verify.every_steps=4", TEST_IMPORTS=MODULE, TEST_WRONG_VALUES=fault.written
    )
    assert found.returncode == 71, found.stderr
    message = found.stderr.replace("\n", " ")
    assert f"cross-check of step 4: wrong values, as they were right the second time: rank 1 on {NODE} (" in message
    assert "which may be wrong, too: steps 2 to 3 were computed with the same machines" in message
    run = tmp_path / "faulty/runs/test/pretrain"
    (entry,) = [entry for entry in events(run) if entry["event"] == "machine_faulty"]
    assert (entry["step"], entry["nodes"], entry["last_passed"]) == (4, [NODE], 1)
    log = (run / "logs/rank-00000.log").read_text()
    assert "cross-check: passed in step 1, by 2 ranks, each of which computed its neighbour's, in " in log
    assert "; another one follows every 4 steps" in log
    assert "cross-checks: 1 passed in this start, the last one in step 1" in log

    again = coatnet("train", recipe, "pretrain", *SETTINGS, "verify.every_steps=4")
    assert again.returncode == 0, again.stderr
    # As at the first step of the start, 4, there is one at that of its interval.
    assert "cross-checks: 1 passed in this start, the last one in step 4" in (run / "logs/rank-00000.log").read_text()
    assert coatnet("train", undisturbed, "pretrain", *SETTINGS).returncode == 0
    # Steps 1 and 4 are in no measured time; those of ranks are shown one step later.
    shown = curves(run)
    assert list(shown["train/images_per_second"]) == [2, 3, 5, 6]
    assert list(shown["wall_time_of_ranks/forward_median_seconds"]) == [3, 6]
    last = "runs/test/pretrain/checkpoints/step-00000006"
    assert checkpoint_bytes(tmp_path / "faulty" / last) == checkpoint_bytes(tmp_path / "undisturbed" / last)


def test_a_rank_that_hangs_in_a_check_is_named(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    # In its neighbour's micro-batch of step 2. The first check of a start has the limit of the set-up.
    hang = Fault(1, "hang", 1 + ROUNDS)
    limits = "watchdog={setup_seconds: 300, least_seconds: 15, factor: 2}"
    found = coatnet(
        "train",
        recipe,
        "pretrain",
        *SETTINGS,
        "verify.every_steps=1",
        limits,
        TEST_IMPORTS=MODULE,
        TEST_WRONG_VALUES=hang.written,
    )
    assert found.returncode == 75, found.stderr
    # The other one has computed its own, and waits to sum the gradients.
    assert f"hang: rank 1 on {NODE} is behind, in section cross-check; the others are in section step, " in found.stderr
