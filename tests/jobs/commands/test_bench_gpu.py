"""`coatnet bench gpu` on a CPU: the same processes and measurements, of a very small stage."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.bundled_recipes import bundled_recipes
from tests.support.command import coatnet, ended, kill, ranks, start, wait_until
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow(seconds=15)


@pytest.fixture(scope="module")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = {"global_size": 24, "micro_size": 2}
    return write_recipe(tmp_path_factory.mktemp("recipe"), shards, batch=batch)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def facts(recipe: Path, scratch: Path) -> dict[str, Any]:
    """All measurements but those of variants, as JSON."""
    parts = ("equal-bits", "burn-in", "parts", "operations", "copies", "saves", "micro-batch")
    chosen = [word for name in parts for word in ("--only", name)]
    out = recipe.with_name("found.json")
    done = coatnet("bench", "gpu", recipe, *chosen, "--scratch", scratch, "--json", "--out", out)
    # Two of them were asked for by name and are not there.
    assert done.returncode == 70, done.stderr
    assert "--only: not measured: copies (not on a CPU), micro-batch (not on a CPU)" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    return found


def test_a_step_is_that_of_the_stage_with_at_most_four_micro_batches(facts: dict[str, Any]) -> None:
    assert (facts["stage"], facts["model"], facts["classes"]) == ("pretrain", "coatnet_debug", 3)
    assert (facts["micro_size"], facts["rounds"], facts["rounds_of_stage"]) == (2, 4, 6)
    step = facts["step"]
    assert all(0.5 < loss < 3 for loss in step["losses"])  # ln 3 is 1.1
    assert step["images_per_second"] == pytest.approx(8 / step["step_milliseconds"] * 1e3)
    assert step["peak_bytes"] > 0
    assert facts["estimated_bytes"] > 0
    assert facts["device"]["name"] == "CPU"
    assert "utilization" not in facts  # it has no peak


def test_two_runs_are_compared_with_the_switch_and_without_it(facts: dict[str, Any]) -> None:
    assert facts["equal_bits"] == [{"deterministic": True, "equal": True}, {"deterministic": False, "equal": True}]
    assert "cost_of_determinism" not in facts  # on a CPU the switch has no effect


def test_one_micro_batch_has_equal_bits_each_time(facts: dict[str, Any]) -> None:
    (device,) = facts["burn_in"]["devices"]
    assert list(device["bits"].values()) == [3]
    assert device["where"] == "this machine"


def test_a_device_that_computes_wrong_values_fails_the_benchmark(recipe: Path) -> None:
    done = coatnet(
        "bench", "gpu", recipe, "--only", "burn-in",
        TEST_IMPORTS="tests.support.wrong_bits", TEST_WRONG_RANK="0", TEST_WRONG_REPETITIONS="1",
    )  # fmt: skip
    assert done.returncode == 70
    assert "computed other bits than itself in 1 of 3 repetitions, in loss, gradient" in done.stdout
    assert "error: this machine (" in done.stderr
    assert "take it out of use before anything is trained on it" in done.stderr


def test_every_part_of_the_model_is_timed(facts: dict[str, Any]) -> None:
    assert [part["name"] for part in facts["parts"]] == [
        "input: copy, normalization", "S0 stem", "S1 1 x mbconv", "S2 1 x mbconv", "S3 1 x transformer",
        "S4 1 x transformer", "head",
    ]  # fmt: skip
    for part in [*(part["work"] for part in facts["parts"]), facts["step"]["optimizer"]]:
        assert part["teraflops"] == pytest.approx(part["operations"] / part["milliseconds"] / 1e9)
        assert part["gigabytes_per_second"] == pytest.approx(part["bytes"] / part["milliseconds"] / 1e6)
        assert "least_milliseconds" not in part


def test_operations_are_summed_up_by_kind(facts: dict[str, Any]) -> None:
    kinds = facts["efficiencies"]["kinds"]
    assert set(kinds) == {"matmul", "attention", "depthwise", "normalization", "elementwise", "copy"}
    products = [one["work"] for one in facts["operations"] if one["kind"] == "matmul"]
    spent = sum(work["milliseconds"] for work in products)
    assert kinds["matmul"]["teraflops"] == pytest.approx(sum(work["operations"] for work in products) / spent / 1e9)
    without = [one for one in facts["operations"] if "work" not in one]
    assert {(one["kind"], one["not_run"]) for one in without} == {
        ("attention", "torch has no such kernel for this device")
    }
    assert facts["efficiencies"]["gpu"] == "CPU"


def test_saves_are_timed_and_their_files_removed(facts: dict[str, Any], scratch: Path) -> None:
    saves = facts["saves"]
    assert len(saves["stall_milliseconds"]) == len(saves["published_seconds"]) == 2
    assert saves["bytes"] > 10_000
    assert saves["folder"] == str(scratch)
    assert list(scratch.iterdir()) == []


def test_what_needs_a_gpu_is_named_and_is_no_failure(facts: dict[str, Any]) -> None:
    assert [(one["name"], one["reason"], one["failed"]) for one in facts["unmeasured"]] == [
        ("copies", "not on a CPU", False), ("micro-batch", "not on a CPU", False),
    ]  # fmt: skip
    assert facts["choices"] == []


def test_measurements_that_hang_crash_or_fill_the_memory_do_not_take_others_with_them(recipe: Path) -> None:
    done = coatnet(
        "bench", "gpu", recipe, "--only", "parts", "--only", "operations", "--only", "saves",
        "--out", recipe.with_name("faults.json"), TEST_IMPORTS="tests.jobs.commands.bench_gpu_faults",
    )  # fmt: skip
    assert done.returncode == 70
    assert "parts, operations, saves failed" in done.stderr
    assert done.stdout.startswith("measured on the CPU, since there is no GPU here: this tells nothing about GPUs\n")
    assert "median of" in done.stdout  # the step
    assert "  parts: failed, did not end within 3 s, and was killed\n" in done.stdout
    full = "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert f"  operations: failed, {full}\n" in done.stdout
    assert "  saves: failed, its process was killed by SIGKILL: about to crash\n" in done.stdout
    hung = json.loads(recipe.with_name("faults.json").read_text())["unmeasured"][0]
    assert "in hang_in_parts" in hung["output"]  # where it hung


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "stopped; the same command"), (signal.SIGTERM, 75, "stopped by SIGTERM; the same command")],
)
def test_a_signal_ends_the_measurement_and_leaves_no_files(
    recipe: Path, tmp_path: Path, number: signal.Signals, code: int, message: str
) -> None:
    running = start("bench", "gpu", recipe, "--scratch", tmp_path)
    wait_until(lambda: bool(ranks(running)), running)
    running.send_signal(number)
    assert f"{message} starts over" in ended(running)  # no process outlives it
    assert running.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_does_not_outlive_a_command_that_is_killed(recipe: Path, tmp_path: Path) -> None:
    running = start("bench", "gpu", recipe, "--scratch", tmp_path)
    wait_until(lambda: bool(ranks(running)), running)
    kill(running, "launcher")


def test_the_fastest_variant_is_written_into_the_recipe_with_its_origin(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, shards, batch={"global_size": 4, "micro_size": 2}, resources={"ranks": 1, "gpus_per_rank": 0}
    )
    before = recipe.read_text()
    done = coatnet(
        "bench", "gpu", recipe, "finetune", "resolution=32", "--only", "variants", "--write", "--json",
        TEST_IMPORTS="tests.jobs.commands.uncompiled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    eager, compiled, *fused = facts["variants"]
    assert (eager["run"]["losses"], compiled["loss_difference"]) == (compiled["run"]["losses"], 0.0)
    assert eager["run"] == facts["step"]  # measured once
    (reason,) = {one.get("not_run") for one in fused}
    assert reason.startswith("fused_depthwise: its kernels run on GPUs, and the ranks of this stage have none")
    (choice,) = facts["choices"]
    after = recipe.read_text()
    (line,) = set(after.splitlines()) - set(before.splitlines())
    compile_ = str(choice["value"]).lower()
    assert (
        line == f"    compile: {compile_} # measured on CPU, {facts['date']}, by coatnet bench gpu with resolution=32"
    )
    assert yaml.safe_load(after)["stages"]["finetune"]["compile"] is choice["value"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "stage evaluate evaluates; name a stage that trains"),
        (["prtrain"], "has no stage prtrain; its stages are pretrain, finetune, evaluate"),
        (["--only", "save"], "--only save: there is no such measurement; did you mean saves?"),
        (["--scratch", "nowhere"], "--scratch nowhere: is not a folder that can be written"),
        (["--write"], "--write: stage pretrain is for GPUs and there is none here"),
        (["batch.micro_size=8"], "2 ranks do not divide the 3 micro-batches"),
        (["resolution=33"], "33 is no multiple of"),
    ],
)
def test_mistakes_show_before_anything_is_measured(recipe: Path, arguments: list[str], message: str) -> None:
    done = coatnet("bench", "gpu", recipe, *arguments)
    assert done.returncode == 78
    assert message in done.stderr
    assert "device: done" not in done.stderr


def test_recipes_that_come_with_the_program_are_measured_but_not_written(tmp_path: Path) -> None:
    demo = bundled_recipes()["demo"]
    done = coatnet("bench", "gpu", demo, "--write", folder=tmp_path)
    assert done.returncode == 78
    assert "comes with the program and stays as it is; copy it: coatnet recipes copy demo" in done.stderr


def test_settings_that_were_to_be_written_and_were_not_measured_are_an_error(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, shards, batch={"global_size": 4, "micro_size": 2}, resources={"ranks": 1, "gpus_per_rank": 0}
    )
    before = recipe.read_text()
    done = coatnet("bench", "gpu", recipe, "--only", "parts", "--write")
    assert done.returncode == 70
    assert f"--write: nothing was written to {recipe}, since what decides was not measured" in done.stderr
    assert "S0 stem" in done.stdout
    assert recipe.read_text() == before
