"""`coatnet verify`: a run that is what it says passes, and one whose log or checkpoints were altered does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from tests.support.command import coatnet
from tests.support.recipes import scalars, sign_again, write_recipe

pytestmark = pytest.mark.slow(seconds=8)


@pytest.fixture(scope="module")
def original(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe that has trained for 12 steps on two ranks, with checkpoints of steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("verified")
    recipe = write_recipe(folder, shards, mixup_alpha=0.2, ema_decay=0.9)
    done = coatnet("train", recipe, "pretrain", "pretrain.steps=12", "checkpoint.keep_last=9")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of its run folder."""
    return Path(shutil.copytree(original / "runs", tmp_path / "runs")) / "test" / "pretrain"


def verified(run: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """The report of `coatnet verify` with `options`, which ends with `code`."""
    done = coatnet("verify", run, *options, "--json")
    assert done.returncode == code, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    written = json.loads((run / "replays/verification/verification.json").read_text())
    assert report == {**written, "folder": report["folder"]}
    return report


def changed(checkpoint: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """`change` the tensors in a file of a checkpoint, and make its manifest match."""
    with safe_open(checkpoint / file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, checkpoint / file)
    sign_again(checkpoint)


def altered(checkpoint: Path) -> None:
    """Add a little to one weight of a checkpoint."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["master.stem.conv1.weight"].view(-1)[0] += 1e-3

    changed(checkpoint, "rank-00000.safetensors", change)


def test_a_run_passes_and_every_logged_value_and_checkpoint_is_equal_to_the_bit(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report = verified(run)
    assert report["holds"]
    assert (report["logged"], report["within_reach"], report["recomputed"]) == (12, 12, 12)
    assert [one["step"] for one in report["steps"]] == list(range(1, 13))
    assert {one["agreement"] for one in report["steps"]} == {"equal"}
    assert [(one["step"], one["holds"]) for one in report["states"]] == [(5, True), (10, True), (12, True)]
    assert all(one["tensors"] == one["equal"] > 200 for one in report["states"])
    assert {path: path.read_bytes() for path in before} == before
    shown = coatnet("verify", run, "--sample", "2")
    assert shown.returncode == 0
    assert "verifies 2 of 12 logged steps and 3 checkpoints: recomputes 12 steps from 3 kept states" in shown.stdout
    assert "the log holds" in shown.stdout


def test_on_another_number_of_ranks_it_passes_within_rounding_and_says_why(run: Path) -> None:
    report = verified(run, "--ranks=1")
    assert report["holds"]
    assert report["why_not_bits"] == ["ranks: 2 then, 1 now", "micro-batches per rank: 2 then, 4 now"]
    distances = report["states"][0]["distances"]
    assert set(distances) == {"master", "exp_avg", "exp_avg_sq", "ema", "statistics"}
    assert 0 < distances["master"] < 1e-4
    assert all(0 < share < 1e-4 for share in distances.values())
    assert report["states"][0]["beyond_rounding"] == []


def test_an_altered_weight_of_the_last_checkpoint_is_found(run: Path) -> None:
    altered(run / "checkpoints/step-00000012")
    report = verified(run, "--sample=0", code=78)
    (problem,) = report["problems"]
    assert "step-00000012: different" in problem
    assert "(not master stem.conv1.weight)" in problem
    assert [one["holds"] for one in report["states"]] == [True, True, False]


def test_an_altered_weight_of_an_earlier_checkpoint_contradicts_the_log_after_it(run: Path) -> None:
    altered(run / "checkpoints/step-00000005")
    report = verified(run, code=78)
    different = [one["step"] for one in report["steps"] if one["agreement"] == "different"]
    assert different == [6, 7, 8, 9, 10]
    assert [one["holds"] for one in report["states"]] == [False, False, True]


def test_an_altered_moving_average_of_a_statistic_is_found(run: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.startswith("ema.") and name.endswith("running_mean"))
        tensors[name].view(-1)[0] += 1e-3

    changed(run / "checkpoints/step-00000012", "buffers.safetensors", change)
    (problem,) = verified(run, "--sample=0", code=78)["problems"]
    assert "equal to the bit (not statistics ema.blocks.0.depthwise_norm.running_mean); the weights are 0 of" in problem


def test_an_altered_count_in_a_manifest_is_found(run: Path) -> None:
    sign_again(run / "checkpoints/step-00000012", optimizer_steps=11)
    (problem,) = verified(run, "--sample=0", code=78)["problems"]
    assert "tensors are equal to the bit (not optimizer_steps)" in problem


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "ema"])
def test_an_altered_kind_of_state_is_beyond_rounding_on_another_number_of_ranks(run: Path, kind: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(f"{kind}."):
                tensor *= 1.05

    for rank in range(2):
        changed(run / "checkpoints/step-00000012", f"rank-{rank:05d}.safetensors", change)
    report = verified(run, "--sample=0", "--ranks=1", code=78)
    (problem,) = report["problems"]
    assert problem.endswith(f", {kind} 0.048 of its norm")
    assert report["states"][2]["beyond_rounding"] == [kind]


def test_an_altered_loss_in_the_log_is_found(run: Path) -> None:
    curve = scalars(run, "train/loss")
    with_other_values = EventFile(run, 11, print)
    for step in (11, 12):
        with_other_values.add(charts.scalars({"train/loss": curve[step] * 0.999}), step)
    with_other_values.close()
    done = coatnet("verify", run)
    assert done.returncode == 78
    assert "does not hold: the log is not what was recomputed: different at steps 11, 12" in done.stdout


def test_a_damaged_checkpoint_is_a_problem(run: Path) -> None:
    path = run / "checkpoints/step-00000010/rank-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    report = verified(run, code=78)
    assert len(report["problems"]) == 2  # as an end and as a beginning
    assert all("step-00000010: damaged" in problem for problem in report["problems"])
    assert report["states"][0]["holds"]


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_a_problem(run: Path) -> None:
    done = coatnet("verify", run, "--json", TEST_IMPORTS="tests.jobs.replay.removing")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["remarks"] == ["not verified, as the run has removed it meanwhile: step 5"]
    assert [one["step"] for one in report["states"]] == [5, 12]


def test_a_checkpoint_that_the_run_removes_while_it_is_compared_asks_to_repeat_the_command(run: Path) -> None:
    done = coatnet("verify", run, TEST_IMPORTS="tests.jobs.replay.removing_while_read")
    assert done.returncode == 75, done.stderr
    assert "step-00000010: removed since this command began, as the run has saved newer ones" in done.stderr


def test_if_the_run_removes_all_that_was_to_be_verified_nothing_passes(run: Path) -> None:
    arguments = ("verify", run, "--sample=1", "--within=2", "--seed=0")
    for step in (10, 12):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    assert "recomputes 2 steps from 1 kept state," in coatnet(*arguments).stdout  # 6 and 7
    done = coatnet(*arguments, TEST_IMPORTS="tests.jobs.replay.removing")
    assert done.returncode == 75
    assert "nothing was verified: not verified, as the run has removed it meanwhile: step 5" in done.stderr
    assert "the log holds" not in done.stdout


def test_damaged_records_of_the_log_are_named(run: Path) -> None:
    (file,) = run.glob("events.out.tfevents.*")
    content = file.read_bytes()
    damaged = content.index(b"train/loss")
    file.write_bytes(content[:damaged] + b"T" + content[damaged + 1 :])
    (remark,) = verified(run)["remarks"]
    assert remark.endswith(f"{file.name}: 1 record damaged and left out")


def test_nothing_to_verify_is_an_error(run: Path) -> None:
    done = coatnet("verify", run, "--sample=0", "--within=1")
    assert done.returncode == 78
    assert "nothing to verify: 3 of its 12 logged steps are within 1 steps after a kept checkpoint" in done.stderr


def test_steps_that_are_far_from_a_checkpoint_are_counted_and_named(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000005")
    done = coatnet("verify", run, "--within", "2")
    assert done.returncode == 0, done.stderr
    assert "8 logged steps cannot be drawn, as no kept state is near; --within reaches farther" in done.stdout


def test_what_cannot_be_verified_is_refused_before_ranks_start(run: Path, shards: Path) -> None:
    for arguments, reason in (
        ([run, "optimizer.eps=1e-7"], "a run is verified with its own settings"),
        ([run, "--ranks", "3"], "--ranks 3: does not divide the 4 micro-batches of a step; use one of 1, 2, 4"),
        ([shards], "contains none"),
    ):
        done = coatnet("verify", *arguments)
        assert done.returncode == 78
        assert reason in done.stderr
