"""`coatnet logs` and `coatnet cancel` on run folders, without Slurm or with a stand-in that answers from a table."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.commands import logs as logs_module
from jobs.scheduler import slurm
from jobs.scheduler.slurm import SchedulerDown, SlurmJob
from tests.jobs.runs import MadeRun


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """A run on a machine without Slurm, with the folder above `runs` as the working directory."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = MadeRun(tmp_path)
    made.freeze()
    return made


def coatnet(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


class Cluster:
    """Stands in for Slurm: jobs with states, and those that were cancelled."""

    def __init__(self, **states: str) -> None:
        self.states = {name.removeprefix("job"): state for name, state in states.items()}
        self.cancelled: list[str] = []

    def jobs(self, numbers: Sequence[str]) -> dict[str, SlurmJob]:
        return {one: SlurmJob(one, self.states.get(one, "UNKNOWN"), nodes="node1") for one in numbers}

    def cancel(self, numbers: Sequence[str]) -> None:
        self.cancelled = list(numbers)

    def answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slurm, "jobs", self.jobs)
        monkeypatch.setattr(slurm, "cancel", self.cancel)


def test_the_log_of_the_stage_that_wrote_last_or_of_the_one_that_is_named(run: MadeRun) -> None:
    os.utime(run.log("finetune", "of finetune"), (1, 1))
    run.log("pretrain", "of pretrain")
    assert coatnet("logs", "runs/small").output == "of pretrain\n"
    assert coatnet("logs", "runs/small", "finetune").output == "of finetune\n"
    assert coatnet("logs", "runs/small/finetune").exit_code == 78  # it has no folder yet
    run.stage("finetune")
    assert coatnet("logs", "runs/small/finetune").output == "of finetune\n"


def test_the_requested_number_of_lines_is_printed(run: MadeRun) -> None:
    run.log("pretrain", *map(str, range(150)))
    assert coatnet("logs", "runs/small").output.split() == [str(number) for number in range(50, 150)]
    assert coatnet("logs", "runs/small", "-n", "2").output == "148\n149\n"
    long = [f"{number:0100}" for number in range(9000)]
    run.log("finetune", *long)
    assert coatnet("logs", "runs/small", "finetune", "-n", "5000").output.split() == long[-5000:]


def test_the_log_of_a_rank_or_of_rank_0_if_there_was_no_job(run: MadeRun) -> None:
    folder = run.stage("pretrain")
    folder.log_file(0).write_text("leader\n")
    folder.log_file(3).write_text("third\n")
    assert coatnet("logs", "runs/small").output == "leader\n"
    run.log("pretrain", "job")
    assert coatnet("logs", "runs/small").output == "job\n"
    assert coatnet("logs", "runs/small", "pretrain", "--rank", "3").output == "third\n"
    refused = coatnet("logs", "runs/small", "pretrain", "--rank", "4")
    assert refused.exit_code == 78
    assert "no log of rank 4 yet: stage pretrain is not started" in " ".join(refused.output.split())


def test_logs_of_array_tasks_are_printed_under_their_names(run: MadeRun) -> None:
    run.submit("shards", "5")
    run.log("shards", "one", task="-1")
    run.log("shards", "two", task="-2")
    assert coatnet("logs", "runs/small", "shards").output == "==> shards-1.log <==\none\n\n==> shards-2.log <==\ntwo\n"


def test_a_stage_without_a_log_is_refused_with_its_state(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing has started" in coatnet("logs", "runs/small").output
    run.submit("pretrain", "7")
    Cluster(job7="PENDING").answer(monkeypatch)
    refused = coatnet("logs", "runs/small", "pretrain")
    assert refused.exit_code == 78
    assert "no log yet: stage pretrain is waiting" in refused.output
    unknown = coatnet("logs", "runs/small", "pretrian")
    assert unknown.exit_code == 78
    assert "no stage pretrian; there are: pretrain, finetune" in unknown.output


def test_following_prints_what_comes_until_the_job_is_over(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(logs_module, "_STATUS_SECONDS", 0.1)
    cluster = Cluster(job7="PENDING")
    cluster.answer(monkeypatch)
    run.submit("pretrain", "7")

    def job() -> None:
        time.sleep(0.3)  # nothing for three checks, and it keeps waiting
        cluster.states["7"] = "RUNNING"
        with open(run.log("pretrain", "first"), "ab") as log:
            for piece in (b"sec", b"ond \xc3", b"\xa9\n"):  # in the middle of a line, and of a letter
                time.sleep(0.1)
                log.write(piece)
                log.flush()
        run.finish("pretrain")
        time.sleep(0.3)  # the stage is done before its job is
        run.log("pretrain", "last")
        cluster.states["7"] = "COMPLETED"

    thread = threading.Thread(target=job)
    thread.start()
    result = coatnet("logs", "runs/small", "pretrain", "-f")
    thread.join()
    assert (result.exit_code, result.output) == (0, "first\nsecond é\nlast\n")


def test_following_ends_with_a_run_without_slurm(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(logs_module, "_STATUS_SECONDS", 0.1)
    folder = run.stage("pretrain")
    folder.log_file(0).write_text("one\n")
    begun = threading.Event()

    def rank() -> None:
        lock = folder.lock()  # of this thread
        begun.set()
        time.sleep(0.3)
        folder.log_file(0).write_text("2\n")  # anew
        time.sleep(0.3)
        lock.close()

    thread = threading.Thread(target=rank)
    thread.start()
    begun.wait()
    result = coatnet("logs", "runs/small", "-f", "-n", "0")
    thread.join()
    assert (result.exit_code, result.output) == (0, "2\n")


def test_a_closed_pipe_is_not_an_error(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log("pretrain", "line")
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(1)
    try:
        with open(writing, "w") as gone:
            monkeypatch.setattr("sys.stdout", gone)
            logs_module.logs(Path("runs/small"))
    finally:
        os.dup2(kept, 1)


def submit_chain(run: MadeRun) -> None:
    run.submit("shards", "5")
    run.submit("pretrain", "6", "--dependency=afterok:5", "--kill-on-invalid-dep=yes")
    run.submit("finetune", "7", "--dependency=afterok:6", "--kill-on-invalid-dep=yes")


def test_cancelling_a_run_cancels_its_live_jobs_and_names_them(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_chain(run)
    cluster = Cluster(job5="COMPLETED", job6="RUNNING", job7="PENDING")
    cluster.answer(monkeypatch)
    assert coatnet("cancel", "runs/small").output.splitlines() == [
        "cancelled pretrain, job 6: it runs on node1; its ranks save and end",
        "cancelled finetune, job 7: it was waiting",
    ]
    assert cluster.cancelled == ["6", "7"]


@pytest.mark.parametrize(
    ("stage", "cancelled"), [("shards", ["5", "6", "7"]), ("pretrain", ["6", "7"]), ("finetune", ["7"])]
)
def test_cancelling_a_stage_cancels_those_that_wait_for_it(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, stage: str, cancelled: list[str]
) -> None:
    submit_chain(run)
    cluster = Cluster(job5="RUNNING", job6="PENDING", job7="PENDING")
    cluster.answer(monkeypatch)
    result = coatnet("cancel", "runs/small", stage)
    assert cluster.cancelled == cancelled
    assert result.output.count("it was waiting for one of these") == len(cancelled) - 1


def test_a_stage_may_be_named_by_its_folder(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_chain(run)
    run.stage("finetune")
    cluster = Cluster(job5="RUNNING", job6="PENDING", job7="PENDING")
    cluster.answer(monkeypatch)
    coatnet("cancel", "runs/small/finetune")
    assert cluster.cancelled == ["7"]


def test_an_older_job_of_a_stage_that_is_still_alive_is_cancelled_too(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.submit("pretrain", "7")
    run.submit("pretrain", "8")
    cluster = Cluster(job7="RUNNING", job8="PENDING")
    cluster.answer(monkeypatch)
    coatnet("cancel", "runs/small")
    assert cluster.cancelled == ["7", "8"]


def test_nothing_to_cancel_is_not_an_error(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    result = coatnet("cancel", "runs/small")
    assert (result.exit_code, result.output) == (
        0,
        "runs/small: nothing to cancel: none of its jobs is waiting or running\n",
    )
    run.submit("pretrain", "7")
    cluster = Cluster(job7="COMPLETING")  # Slurm refuses to cancel these
    cluster.answer(monkeypatch)
    assert coatnet("cancel", "runs/small").exit_code == 0
    assert cluster.cancelled == []


def test_a_run_without_slurm_is_stopped_where_it_was_started(run: MadeRun) -> None:
    lock = run.stage("pretrain").lock()
    assert (
        "pretrain runs without Slurm; stop it where it was started, with Ctrl-C or SIGTERM"
        in coatnet("cancel", "runs/small").output
    )
    lock.close()


def test_cancel_takes_one_run_and_its_stages(run: MadeRun, tmp_path: Path) -> None:
    MadeRun(tmp_path, "large").freeze()
    several = coatnet("cancel", "runs")
    assert several.exit_code == 78
    assert "runs: 2 runs (runs/large, runs/small); name one of them" in several.output
    unknown = coatnet("cancel", "runs/small", "pretrian")
    assert unknown.exit_code == 78
    assert "no stage pretrian; there are: pretrain, finetune" in unknown.output


def test_a_sweep_is_cancelled_as_a_whole_and_its_logs_are_read_run_by_run(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = MadeRun(tmp_path, "other")
    other.freeze()
    settings = {"small": {"seed": "1"}, "other": {"seed": "2"}}
    (tmp_path / "runs/both.sweep.json").write_text(
        f'{{"runs": ["small", "other"], "settings": {settings}}}'.replace("'", '"')
    )
    run.submit("pretrain", "7")
    other.submit("pretrain", "8")
    cluster = Cluster(job7="PENDING", job8="PENDING")
    cluster.answer(monkeypatch)
    assert coatnet("cancel", "runs/both").output.splitlines() == [
        "cancelled small pretrain, job 7: it was waiting",
        "cancelled other pretrain, job 8: it was waiting",
    ]
    assert cluster.cancelled == ["7", "8"]
    base = MadeRun(tmp_path, "both")
    base.submit("shards", "5")
    run.submit("pretrain", "9", "--dependency=afterok:5")
    cluster.states = {"5": "RUNNING", "9": "PENDING", "8": "PENDING"}
    coatnet("cancel", "runs/both", "shards")
    assert cluster.cancelled == ["5", "9"]
    refused = coatnet("logs", "runs/both")
    assert refused.exit_code == 78
    assert "a sweep of 3 runs; name one: runs/both, runs/small, runs/other" in refused.output


def test_cancel_reports_that_slurm_is_down_and_can_be_repeated(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(numbers: Iterator[str]) -> dict[str, SlurmJob]:
        raise SchedulerDown("squeue: Unable to contact slurm controller")

    monkeypatch.setattr(slurm, "jobs", down)
    run.submit("pretrain", "7")
    result = coatnet("cancel", "runs/small")
    assert result.exit_code == 75
    assert result.output == "error: squeue: Unable to contact slurm controller; the same command tries again\n"
