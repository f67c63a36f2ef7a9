"""The status of jobs, from Slurm's answers and from their logs."""

import json
import re
import time
from dataclasses import replace

import pytest

from jobs.scheduler import slurm
from jobs.scheduler.job_log import job_outcome
from jobs.scheduler.slurm import SchedulerDown, SlurmJob
from tests.jobs.runs import MadeRun, at, lines, row, running, slurm_reports, status

START = f"{at(500)} job 7: start 0 on node[1-2], 8 tasks"
OTHERS = f"{at(900)} job 6: failed with exit code 78, not requeued: of another job"


# A state in Slurm, and the status and reason that are shown for it.
@pytest.mark.parametrize(
    ("job", "state", "reason"),
    [
        (SlurmJob("7", "PENDING", "Priority"), "waiting", "Priority"),
        (SlurmJob("7", "PENDING", "Dependency"), "waiting", "Dependency"),
        (SlurmJob("7", "PENDING", "Resources", starts=86400), "waiting", r"Resources, in about 2[34]:\d\d:\d\d"),
        (SlurmJob("7", "PENDING", "BeginTime", starts=3600), "waiting", r"starts in (1:00:00|5\d:\d\d)"),
        (SlurmJob("7", "PENDING", "BeginTime"), "waiting", "BeginTime"),
        (SlurmJob("7", "PENDING", "", starts=3600), "waiting", r"in about (1:00:00|5\d:\d\d)"),
        (SlurmJob("7", "PENDING", ""), "waiting", ""),
        (SlurmJob("7", "REQUEUE_HOLD", "launch failed"), "waiting", "requeue hold: launch failed"),
        (SlurmJob("7", "RUNNING", "", "node1"), "running", ""),
        (SlurmJob("7", "CONFIGURING", "", "node1"), "running", "preparing nodes"),
        (SlurmJob("7", "COMPLETING", "", "node1"), "running", "ending"),
        (SlurmJob("7", "SUSPENDED", "", "node1"), "running", "suspended"),
        (SlurmJob("7", "CANCELLED", "DependencyNeverSatisfied"), "cancelled", "DependencyNeverSatisfied"),
        (SlurmJob("7", "FAILED", "NonZeroExitCode"), "failed", "failed: NonZeroExitCode"),
        (SlurmJob("7", "OUT_OF_MEMORY", "OutOfMemory"), "failed", "out of memory: OutOfMemory"),
        (SlurmJob("7", "TIMEOUT", "TimeLimit"), "stopped", "time limit"),
        (SlurmJob("7", "NODE_FAIL", ""), "stopped", "a node failed"),
        (SlurmJob("7", "PREEMPTED", ""), "stopped", "preempted"),
        (SlurmJob("7", "COMPLETED", ""), "stopped", "its job ended before the stage was done"),
        (SlurmJob("7", "UNKNOWN", ""), "cancelled", "before it started"),
    ],
    ids=lambda value: f"{value.state} {value.reason}" if isinstance(value, SlurmJob) else "",
)  # fmt: skip
def test_each_state_of_a_job_has_a_status_and_a_reason(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, job: SlurmJob, state: str, reason: str
) -> None:
    run.freeze()
    run.submit("pretrain", "7")
    if job.starts is not None:  # seconds from now
        job = replace(job, starts=int(time.time()) + job.starts)
    slurm_reports(monkeypatch, job)
    found = row("runs/small")
    assert (found["job"], found["state"], found["slurm_state"], found["nodes"]) == ("7", state, job.state, job.nodes)
    assert re.fullmatch(reason, found["reason"]), found["reason"]


# What the log of a job yields if Slurm has forgotten the job, only reports its failure, or is down.
@pytest.mark.parametrize(
    ("log", "forgotten", "failed", "down"),
    [
        (
            [OTHERS, START, "error: recipe x.yaml: bad", f"{at(9)} job 7: failed with exit code 78, not requeued: recipe x.yaml: bad"],
            ("failed", "recipe x.yaml: bad"),
            ("failed", "recipe x.yaml: bad"),
            ("failed", "recipe x.yaml: bad"),
        ),
        (
            [START, "error: rank 1: lost its GPU", "slurmstepd: error: ...", f"{at(9)} job 7: failed with exit code 9, not requeued: srun ended with 9"],
            ("failed", "rank 1: lost its GPU"),
            ("failed", "rank 1: lost its GPU"),
            ("failed", "rank 1: lost its GPU"),
        ),
        (
            [START, f"{at(9)} job 7: failed with exit code 78, not requeued: other settings:", "    steps: 1 -> 2", "  Restore them", "srun: bye"],
            ("failed", "other settings:\n  steps: 1 -> 2\nRestore them"),
            ("failed", "other settings:\n  steps: 1 -> 2\nRestore them"),
            ("failed", "other settings:\n  steps: 1 -> 2\nRestore them"),
        ),
        (
            [START, f"{at(9)} job 7: failed: 3 starts in a row ended before the run began (srun ended with 1)"],
            ("failed", "3 starts in a row ended before the run began (srun ended with 1)"),
            ("failed", "3 starts in a row ended before the run began (srun ended with 1)"),
            ("failed", "3 starts in a row ended before the run began (srun ended with 1)"),
        ),
        (
            [START, f"{at(9)} job 7: ended as COMPLETING None: stopped by SIGTERM after step 9"],
            ("cancelled", "stopped by SIGTERM after step 9"),
            ("failed", "stopped by SIGTERM after step 9"),
            ("cancelled", "stopped by SIGTERM after step 9"),
        ),
        (
            [START, f"{at(9)} job 7: requeued: stopped by SIGUSR2", f"{at(9)} job 7: could not be requeued; submit it again, and it continues"],
            ("stopped", "stopped by SIGUSR2"),
            ("stopped", "stopped by SIGUSR2"),
            ("stopped", "stopped by SIGUSR2"),
        ),
        (
            [START],
            ("stopped", "its job ended without a message"),
            ("failed", "failed: NonZeroExitCode"),
            ("unknown", "Slurm does not answer"),
        ),
        (
            [START, f"{at(9)} job 7: done"],
            ("stopped", "its job ended before the stage was done"),
            ("failed", "failed: NonZeroExitCode"),
            ("stopped", "its job ended before the stage was done"),
        ),
        (
            [OTHERS],
            ("cancelled", "before it started"),
            ("failed", "failed: NonZeroExitCode"),
            ("unknown", "Slurm does not answer"),
        ),
    ],
    ids=["refused", "srun", "several lines", "no start", "cancelled", "not requeued", "killed", "done", "not started"],
)  # fmt: skip
def test_the_reason_for_the_end_of_a_job_comes_from_its_log(
    run: MadeRun,
    monkeypatch: pytest.MonkeyPatch,
    log: list[str],
    forgotten: tuple[str, str],
    failed: tuple[str, str],
    down: tuple[str, str],
) -> None:
    run.freeze()
    run.submit("pretrain", "7")
    run.log("pretrain", *log)
    found = row("runs/small")
    assert (found["state"], found["reason"]) == down
    for job, expected in ((SlurmJob("7", "UNKNOWN"), forgotten), (SlurmJob("7", "FAILED", "NonZeroExitCode"), failed)):
        slurm_reports(monkeypatch, job)
        found = row("runs/small")
        assert (found["state"], found["reason"]) == expected
        assert found["nodes"] == ("node[1-2]" if START in log else "")


def test_the_outcome_is_found_at_the_end_of_a_long_log(run: MadeRun) -> None:
    run.submit("pretrain", "7")
    log = run.log("pretrain", START, *["pretrain  step 1/40  loss 1.0"] * 20000)
    outcome = job_outcome([log], "7")
    assert outcome is not None
    assert outcome.kind == "started"
    run.log("pretrain", f"{at(9)} job 7: failed with exit code 70, not requeued: losses are not finite")
    outcome = job_outcome([log], "7")
    assert outcome is not None
    assert (outcome.kind, outcome.why) == ("failed", "losses are not finite")


def test_an_array_has_the_outcome_of_its_worst_task(run: MadeRun) -> None:
    ends = [
        "done",
        "failed with exit code 78, not requeued: no images",
        "start 0 on node1, 1 tasks",
        "done",
    ]
    for task, end in enumerate(ends):
        run.log("shards", f"{at(9)} job 5_{task}: {end}", task=f"-{task}")
    outcome = job_outcome(run.submissions.logs("shards"), "5")
    assert outcome is not None
    assert (outcome.kind, outcome.why) == ("failed", "no images")


def test_status_without_slurm_uses_the_run_folder_and_says_so(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(numbers: object) -> dict[str, SlurmJob]:
        raise SchedulerDown("squeue: slurm_load_jobs error: Unable to contact slurm controller")

    monkeypatch.setattr(slurm, "jobs", down)
    run.freeze()
    run.submit("pretrain", "7")
    run.submit("finetune", "8")
    run.log("pretrain", START)
    run.progress("pretrain", 30, 40)
    with running(run, "pretrain"):
        result = status("runs/small")
    assert lines(result)[2][:5] == ["pretrain", "7", "running", "-", "node[1-2]"]
    assert lines(result)[3][:7] == ["finetune", "8", "unknown", "Slurm", "does", "not", "answer"]
    assert (
        "Slurm does not answer, so this is from the run folders alone: squeue: slurm_load_jobs error" in result.output
    )


def test_slurm_is_not_queried_about_stages_that_are_done(run: MadeRun) -> None:
    run.freeze()
    run.submit("pretrain", "7")
    run.log("pretrain", START, f"{at(9)} job 7: done")
    run.finish("pretrain")
    report = json.loads(status("runs/small", "--json").stdout)
    assert report["slurm"] is None
    found = report["stages"][0]
    assert (found["state"], found["job"], found["nodes"]) == ("done", "7", "node[1-2]")


def test_a_requeued_job_is_shown_as_such(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.freeze()
    run.submit("pretrain", "7")
    run.log("pretrain", START, f"{at(9)} job 7: requeued: stopped by SIGUSR2 after step 9")
    slurm_reports(monkeypatch, SlurmJob("7", "PENDING", "BeginTime", starts=int(time.time()) + 110))
    assert re.fullmatch(r"requeued, starts in 1:(4\d|50)", row("runs/small")["reason"])
