"""Runs of two ranks that are stopped: by signals to any process at any time, and by time limits."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command import Process, coatnet, ended, handles, rank, ranks, start, wait_until
from tests.support.pipes import full_pipe
from tests.support.recipes import checkpoint_bytes, events, scalars, write_recipe

pytestmark = pytest.mark.slow(seconds=7)
STEPS = 100  # enough that no stop arrives near the end, however late it is sent
SETTINGS = [f"pretrain.steps={STEPS}", "pretrain.checkpoint.every_steps=10"]
AGAIN = "the same command continues"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted pretraining."""
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), shards)
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "runs" / "test" / "pretrain"


def message_of(process: Process, code: int = 75) -> str:
    """The message of a stopped command, which has exited with `code` and left no rank behind."""
    message = ended(process)
    assert process.returncode == code, message
    assert message.startswith("error: stopped by "), message
    assert message.count("\n") == 1, message
    return message


def test_a_run_that_is_stopped_in_every_way_equals_the_uninterrupted_one(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    log = run / "logs" / "rank-00000.log"

    def launcher(process: Process) -> None:
        process.send_signal(signal.SIGTERM)

    def one_rank(process: Process) -> None:
        rank(process, 1).send_signal(signal.SIGUSR2)

    def everyone(process: Process) -> None:
        for one in [psutil.Process(process.pid), *ranks(process)]:
            one.send_signal(signal.SIGCONT)
            one.send_signal(signal.SIGUSR1)

    stops: list[tuple[str, Callable[[Process], None]]] = [
        ("SIGTERM", launcher), ("SIGUSR2", one_rank), ("SIGUSR1", everyone),
    ]  # fmt: skip
    place = run / "checkpoints"
    reached = 0
    for name, stop in stops:
        with full_pipe() as (reader, writer):  # whose reader sees nothing until the end is near
            process = start("run", recipe, *SETTINGS, output=writer)
            wait_until(lambda: log.exists() and f"step {reached + 3}/{STEPS}" in log.read_text(), process)  # noqa: B023
            stop(process)
            writer.close()
            reading = threading.Thread(target=reader.readall)  # type: ignore[attr-defined]
            reading.start()
            message = message_of(process)
            reading.join(60)
        last = events(run)[-1]
        assert (last["event"], last["reason"]) == ("stop", name)
        reached = last["step"]
        checkpoint = f"step-{reached:08d}"
        assert (
            message == f"error: stopped by {name} after step {reached}, saved as {checkpoint} in {place}; "
            f"{AGAIN} from the last checkpoint\n"
        )
        assert (run / "checkpoints" / checkpoint / "manifest.json").exists()
    assert not (tmp_path / "runs/test/finetune").exists()

    # Even if the limit is near from the beginning, each start takes one step.
    in_job = {"SLURM_JOB_ID": "7", "SLURM_TASK_PID": str(os.getpid())}
    limits: tuple[tuple[list[str], dict[str, Any]], ...] = (
        (["resources.time_limit=0:00:05"], {}),
        ([], in_job | {"SLURM_JOB_END_TIME": str(int(time.time()) + 20)}),
    )
    for settings, variables in limits:
        limited = coatnet("train", recipe, "pretrain", *SETTINGS, *settings, **variables)
        reached += 1
        assert limited.returncode == 75, limited.stderr
        assert (
            f"stopped by the time limit after step {reached}, saved as step-{reached:08d} in {place}; {AGAIN}"
            in limited.stderr
        )

    distant: dict[str, Any] = in_job | {"SLURM_JOB_END_TIME": str(int(time.time()) + 100_000)}
    done = coatnet("train", recipe, "pretrain", *SETTINGS, "resources.time_limit=1-00:00:00", **distant)
    assert done.returncode == 0, done.stderr
    final = f"checkpoints/step-{STEPS:08d}"
    assert checkpoint_bytes(run / final) == checkpoint_bytes(undisturbed / final)
    assert scalars(run, "train/loss") == scalars(undisturbed, "train/loss")


@pytest.mark.parametrize("moment", ["launcher-starts", "ranks-start", "ranks-import", "one-rank-imports"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(moment: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    process = start("train", recipe, "pretrain", *SETTINGS)
    if moment == "launcher-starts":
        wait_until(lambda: handles(process.pid, signal.SIGUSR1), process)
        process.send_signal(signal.SIGUSR1)
    else:
        wait_until(lambda: len(psutil.Process(process.pid).children()) == 2, process)
        if moment != "ranks-start":
            wait_until(lambda: all(handles(rank(process, n).pid, signal.SIGUSR1) for n in (0, 1)), process)
        target = rank(process, 1).pid if moment == "one-rank-imports" else process.pid
        os.kill(target, signal.SIGUSR1)
    assert message_of(process) in (
        "error: stopped by SIGUSR1; nothing of this stage has been saved, so the same command starts it over\n",
        "error: stopped by SIGUSR1; the same command continues\n",  # while the recipe was being read
    )
    assert not any((tmp_path / "runs/test/pretrain/checkpoints").glob("*"))
    for log in (tmp_path / "runs/test/pretrain/logs").glob("*"):
        assert "Traceback" not in log.read_text()


def test_an_evaluation_is_repeated_however_often_it_is_stopped(undisturbed: Path, tmp_path: Path) -> None:
    """It makes no checkpoints, so these starts show no progress; three that fail by themselves would be the last."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "runs/test/evaluate"
    shutil.copytree(undisturbed.parents[2], tmp_path, dirs_exist_ok=True)
    # Large images, so that it does not end before it is stopped.
    command = ["train", str(recipe), "evaluate", "evaluate.start_from=pretrain", "evaluate.resolution=512", *SETTINGS]
    for number in range(1, 5):
        process = start(*command)
        wait_until(lambda: begun(run) == number, process)  # noqa: B023
        process.send_signal(signal.SIGTERM)
        assert message_of(process) == (
            "error: stopped by SIGTERM; nothing of this stage has been saved, so the same command starts it over\n"
        )
    done = coatnet(*command)
    assert done.returncode == 0, done.stderr
    entries = [entry["event"] for entry in events(run) if entry["event"] not in ("start", "weights")]
    assert entries == [*["begin", "stop"] * 4, "begin", "evaluation", "finish"]


def test_a_person_who_presses_control_c_twice_each_time_may_start_again_as_often_as_they_like(
    shards: Path, tmp_path: Path
) -> None:
    """A stage that ends at once saves nothing, and three such starts by itself would be the last."""
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 1, "gpus_per_rank": 0})
    run = tmp_path / "runs" / "test" / "pretrain"
    log = run / "logs/rank-00000.log"
    command = ["train", str(recipe), "pretrain", "pretrain.steps=9", "pretrain.batch.global_size=9"]
    for number in range(1, 5):
        process = start(*command, "data.lanes=3", "log.every_steps=1", "pretrain.evaluation.every_steps=1000000")
        wait_until(lambda: begun(run) == number, process)  # noqa: B023
        rank(process, 0).suspend()
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)  # within half a second it would be the same key press
        process.send_signal(signal.SIGINT)
        assert message_of(process, 130) == (
            "error: stopped by SIGINT; a second signal, SIGINT, ended it at once; nothing of this stage has been saved, "
            "so the same command starts it over\n"
        )
    assert [entry.get("at_once") for entry in events(run) if entry["event"] == "stop"] == [True] * 4
    done = coatnet(*command, "data.lanes=3")
    assert done.returncode == 0, done.stderr + log.read_text()


def begun(run: Path) -> int:
    """The number of starts in the event log."""
    return [entry["event"] for entry in events(run)].count("begin") if (run / "events.jsonl").exists() else 0


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_a_run_whose_ranks_cannot_agree_still_ends_and_names_the_last_whole_checkpoint(
    how: str, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    grace = 3 if how == "deadline" else 600
    changes = ["pretrain.steps=3000", f"pretrain.checkpoint.grace_seconds={grace}", "pretrain.checkpoint.every_steps=5"]
    process = start("train", recipe, "pretrain", *changes)
    wait_until(lambda: (run / "checkpoints/step-00000005").exists(), process)
    rank(process, 1).suspend()
    newest = 0
    while newest != (newest := len((run / "events.jsonl").read_text())):
        time.sleep(2)  # rank 0 reaches the point where it waits for rank 1
    process.send_signal(signal.SIGTERM)
    if how == "second signal":
        time.sleep(7)
        process.send_signal(signal.SIGUSR2)
    message = message_of(process)
    if how == "second signal":
        why = "a second signal, SIGUSR2, ended it at once"
        published = [path.name for path in (run / "checkpoints").glob("step-*")]
        assert message in [f"error: stopped by SIGTERM; {why}; {AGAIN} from {whole}\n" for whole in published]
        last = events(run)[-1]
        assert (last["event"], last["reason"], last["at_once"]) == ("stop", "SIGTERM", True)
        return
    why = "its save was not complete after checkpoint.grace_seconds (3)"
    # Rank 0 does not learn that its newest checkpoint is complete if rank 1 is suspended just then.
    published = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert message in [
        f"error: stopped by SIGTERM; {why}; {whole} is complete, and {AGAIN} from it\n" for whole in published
    ]


def test_a_stage_of_several_machines_is_refused_before_anything_runs(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    commands: tuple[list[str | Path], ...] = (["run", recipe], ["train", recipe, "finetune"])
    for command in commands:
        refused = coatnet(*command, "finetune.resources.nodes=2", "finetune.resources.ranks=4")
        assert refused.returncode == 78
        assert "stage finetune: resources.nodes is 2, but this command starts ranks on one machine; " in refused.stderr
        assert "set resources.nodes=1 resources.ranks=2" in refused.stderr
    assert not (tmp_path / "runs").exists()
