"""`coatnet status`, `cancel` and `logs` of jobs on a real Slurm cluster, with accounting and without."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.commands import logs as logs_module
from jobs.scheduler import slurm as slurm_commands
from jobs.scheduler.slurm import SlurmJob
from tests.jobs.runs import MadeRun
from tests.servers.slurm import SlurmCluster
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow(seconds=6)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """A chain of two stages that has not been submitted."""
    monkeypatch.chdir(tmp_path)
    made = MadeRun(tmp_path)
    made.freeze()
    return made


@pytest.fixture
def accounting(slurm_accounting: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    for name, value in slurm_accounting.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_accounting
    slurm_accounting.reset()


def submit(cluster: SlurmCluster, run: MadeRun, stage: str, script: str, *options: str) -> str:
    """Submit a job and record it for the run."""
    log = run.submissions.log(stage)
    output = log.with_name(f"{log.stem}-%a.log") if any("--array" in option for option in options) else log
    command = ["sbatch", "--parsable", "--open-mode=append", f"--output={output}", *options, f"--wrap={script}"]
    job = cluster.run(*command).strip()
    run.submissions.add(stage, job, command)
    return job


@pytest.fixture
def launch(slurm: SlurmCluster, run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Submits the batch script of pretraining, with the given shell code as its `coatnet`."""
    template = ROOT / "slurm" / "pretrain.sbatch"
    place = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]

    def launched(task: str) -> str:
        program = tmp_path / "coatnet"
        program.write_text(f"#!/usr/bin/env bash\n{task}\n")
        program.chmod(0o700)
        monkeypatch.setenv("COATNET", str(program))
        command = [
            "sbatch",
            "--parsable",
            f"--output={run.submissions.log('pretrain')}",
            *place,
            str(template),
            "x.yaml",
        ]
        job = slurm.run(*command).strip()
        run.submissions.add("pretrain", job, command)
        return job

    return launched


def coatnet(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def rows() -> list[dict[str, Any]]:
    result = coatnet("status", "runs/small", "--json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)["stages"]
    return found


def states() -> list[tuple[str, str]]:
    return [(row["state"], row["reason"]) for row in rows()]


def await_state(slurm: SlurmCluster, stage: int, state: str) -> dict[str, Any]:
    """Wait until a stage is in that state; returns its row."""
    found: dict[str, Any] = {}

    def reached() -> bool:
        found.update(rows()[stage])
        return bool(found["state"] == state)

    slurm.wait_until(reached, f"{state} expected of stage {stage}")
    return found


def await_reason(slurm: SlurmCluster, job: str, reason: str) -> None:
    """Wait until Slurm gives the reason why the job waits, which takes it a while."""
    slurm.wait_until(lambda: slurm.job(job)["Reason"] == reason, f"{reason} expected of job {job}")


def test_a_running_and_a_waiting_job_are_shown_and_cancelled(slurm: SlurmCluster, run: MadeRun) -> None:
    first = submit(slurm, run, "pretrain", "sleep 600", "--nodes=2")
    slurm.wait_for(first, "RUNNING")
    second = submit(slurm, run, "finetune", "true", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    found = rows()
    assert [(row["job"], row["slurm_state"], row["nodes"]) for row in found] == [
        (first, "RUNNING", "node[1-2]"), (second, "PENDING", ""),
    ]  # fmt: skip
    assert found[0]["state"] == "running"
    assert found[0]["reason"].startswith("starting for ")
    assert (found[1]["state"], found[1]["reason"]) == ("waiting", "Dependency")
    result = coatnet("cancel", "runs/small", "pretrain")
    assert (result.exit_code, result.output.splitlines()) == (
        0,
        [
            f"cancelled pretrain, job {first}: it runs on node[1-2]; its ranks save and end",
            f"cancelled finetune, job {second}: it was waiting for one of these",
        ],
    )
    await_state(slurm, 0, "cancelled")
    await_state(slurm, 1, "cancelled")
    assert "nothing to cancel" in coatnet("cancel", "runs/small").output


def test_ended_and_forgotten_jobs_have_a_state_and_cannot_be_cancelled(slurm: SlurmCluster, run: MadeRun) -> None:
    submit(slurm, run, "pretrain", "exit 3")
    assert await_state(slurm, 0, "failed")["reason"] == "failed: NonZeroExitCode"
    submit(slurm, run, "pretrain", "true")
    assert await_state(slurm, 0, "stopped")["reason"] == "its job ended before the stage was done"
    run.submit("finetune", "99999")
    assert states()[1] == ("cancelled", "before it started")
    # Those that ended are not passed to scancel.
    assert (
        coatnet("cancel", "runs/small").output
        == "runs/small: nothing to cancel: none of its jobs is waiting or running\n"
    )


def test_a_requeued_job_shows_when_it_starts(slurm: SlurmCluster, run: MadeRun) -> None:
    job = submit(slurm, run, "pretrain", "sleep 600", "--requeue")
    slurm.wait_for(job, "RUNNING")
    slurm.run("scontrol", "requeue", job)
    await_reason(slurm, job, "BeginTime")
    found = rows()[0]
    assert found["state"] == "waiting"
    assert re.fullmatch(r"starts in 0:\d\d|BeginTime", found["reason"]), found


def test_an_array_is_one_row_and_cancelled_as_a_whole(slurm: SlurmCluster, run: MadeRun) -> None:
    job = submit(slurm, run, "shards", 'echo "part $SLURM_ARRAY_TASK_ID"; sleep 600', "--array=1-3")
    slurm.wait_for(f"{job}_1", "RUNNING")
    row = await_state(slurm, 0, "running")
    assert (row["stage"], row["job"]) == ("shards", job)
    coatnet("cancel", "runs/small", "shards")
    slurm.wait_for(f"{job}_3", "CANCELLED")
    assert await_state(slurm, 0, "cancelled")["job"] == job


def test_a_log_is_followed_until_the_job_is_over(
    slurm: SlurmCluster, run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "_STATUS_SECONDS", 0.5)
    submit(slurm, run, "pretrain", "for n in 1 2 3; do echo line $n; sleep 1; done")
    result = coatnet("logs", "runs/small", "pretrain", "-f")
    assert (result.exit_code, result.output) == (0, "line 1\nline 2\nline 3\n")


def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "jobs", lambda numbers: {one: SlurmJob(one, "UNKNOWN") for one in numbers})


def test_a_reason_in_the_log_counts_even_when_slurm_has_forgotten_the_job(
    slurm: SlurmCluster, launch: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slurm does not end a task that it has yet to start, so rank 1 waits for rank 0.
    launch(
        'if [ "$RANK" = 0 ]; then touch started; exec sleep 600; fi\n'
        "until [ -e started ]; do sleep 0.1; done\n"
        'printf "70\\nlosses\\n  are nan\\n" > "$COATNET_CAUSE_FILE"; exit 70'
    )
    found = await_state(slurm, 0, "failed")
    assert (found["reason"], found["nodes"]) == ("losses\nare nan", "node[1-2]")
    forgotten(monkeypatch)
    found = rows()[0]
    assert (found["state"], found["reason"], found["nodes"]) == ("failed", "losses\nare nan", "node[1-2]")


def test_a_stop_that_was_saved_waits_for_its_next_start(
    slurm: SlurmCluster, run: MadeRun, launch: Callable[[str], str]
) -> None:
    launch(
        'touch "$COATNET_BEGUN_FILE"; printf "75\\nstopped by SIGUSR2\\n" > "$COATNET_CAUSE_FILE"\n'
        "until [ -e stop ]; do sleep 0.1; done; exit 75"
    )
    await_state(slurm, 0, "running")
    Path("stop").touch()
    await_state(slurm, 0, "waiting")
    await_reason(slurm, run.submissions.newest()["pretrain"].job, "BeginTime")
    found = rows()[0]
    assert re.fullmatch(r"requeued, (starts in 0:\d\d|BeginTime)", found["reason"]), found


def test_cancelled_ranks_save(
    slurm: SlurmCluster, run: MadeRun, launch: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = 'printf "75\\nstopped by SIGTERM, saved\\n" > "$COATNET_CAUSE_FILE"; touch saved; exit 75'
    job = launch(f"trap '{saving}' TERM; touch listening; while sleep 0.2; do :; done")
    slurm.wait_until(Path("listening").exists)
    assert f"cancelled pretrain, job {job}: it runs on node[1-2]" in coatnet("cancel", "runs/small").output
    slurm.wait_for(job, "CANCELLED")
    assert Path("saved").exists()
    slurm.wait_until(lambda: "ended as" in run.submissions.log("pretrain").read_text())
    assert rows()[0]["state"] == "cancelled"
    forgotten(monkeypatch)
    assert states()[0] == ("cancelled", "stopped by SIGTERM, saved")


def test_status_and_cancel_report_a_controller_that_is_down(slurm: SlurmCluster, run: MadeRun) -> None:
    job = submit(slurm, run, "pretrain", "sleep 600")
    slurm.wait_for(job, "RUNNING")
    run.note("finetune", "begin")
    slurm.kill_controller()
    shown = coatnet("status", "runs/small")
    assert shown.exit_code == 0
    assert re.search(rf"pretrain +{job} +unknown +Slurm does not answer", shown.output)
    assert re.search(r"finetune +- +stopped", shown.output)
    assert "so this is from the run folders alone: squeue: " in shown.output
    cancelled = coatnet("cancel", "runs/small")
    assert cancelled.exit_code == 75
    assert "the same command tries again" in cancelled.output


def test_with_accounting_what_the_controller_has_forgotten_is_known(accounting: SlurmCluster, run: MadeRun) -> None:
    failed = submit(accounting, run, "pretrain", "exit 3")
    cancelled = submit(accounting, run, "finetune", "true", "--begin=now+600")
    accounting.wait_for(failed, "FAILED")
    accounting.run("scancel", cancelled)
    accounting.wait_for(cancelled, "CANCELLED")
    command = ["sacct", "-XPn", f"--jobs={failed},{cancelled}", "--format=State"]
    accounting.wait_until(lambda: {"FAILED", "CANCELLED"} <= set(accounting.run(*command).split()))
    accounting.kill_controller()
    shutil.rmtree(accounting.folder / "state")
    (accounting.folder / "state").mkdir()
    accounting.start_controller()
    assert accounting.run("squeue", "--noheader", "--states=all") == ""
    assert [(row["job"], row["state"]) for row in rows()] == [(failed, "failed"), (cancelled, "cancelled")]
