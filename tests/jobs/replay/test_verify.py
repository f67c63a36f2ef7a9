"""`coatnet verify`: a run that is what it says passes, and one whose log or checkpoints were altered does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

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


def altered(checkpoint: Path) -> None:
    """Add a little to one weight of a checkpoint, and make its manifest match."""
    path = checkpoint / "rank-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["master.stem.conv1.weight"].view(-1)[0] += 1e-3
    save_file(tensors, path)
    sign_again(checkpoint)


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
    assert 0 < report["states"][0]["distance"] < 1e-4


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
