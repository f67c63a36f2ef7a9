"""`coatnet status` on run folders in every condition."""

import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.run_discovery import find_runs
from jobs.scheduler import slurm
from jobs.scheduler.slurm import SlurmJob
from jobs.scheduler.stage_status import StatusReport, clock, duration, stage_statuses
from tests.jobs.runs import MadeRun, at, lines, row, rows, running, slurm_reports, status
from tests.pipeline.checkpoints.small import freeze, save
from tests.support.recipes import write_recipe

START = f"{at(500)} job 7: start 0 on node[1-2], 8 tasks"
OTHERS = f"{at(900)} job 6: failed with exit code 78, not requeued: of another job"


def test_a_chain_without_slurm_from_its_first_stage_to_its_last(run: MadeRun) -> None:
    run.freeze()
    run.note("pretrain", "begin", ranks=2)
    run.note("pretrain", "save", ago=90, step=40)
    run.progress("pretrain", 40, 40)
    run.finish("pretrain")
    run.note("finetune", "begin", ranks=2)
    run.note("finetune", "begin", ranks=2)
    run.note("finetune", "save", ago=300, step=2)
    run.note("finetune", "evaluation", step=2, top1=0.5)
    run.progress("finetune", 4, 6, left=100)
    with running(run, "finetune"):
        shown = lines(status("runs/small"))
    assert shown[0] == ["stage", "state", "step", "images/s", "loss", "top-1", "checkpoint", "age", "restarts", "ETA"]
    assert " ".join(shown[2]) == "pretrain done 40/40 480 1.2500 75.00% step-00000040 1 min 0 -"
    assert " ".join(shown[3]) == "finetune running 4/6 512 1.2500 50.00% step-00000002 5 min 1 1:40"


def test_a_stage_that_has_not_started_shows_the_steps_of_the_recipe(run: MadeRun) -> None:
    run.freeze()
    found = row("runs/small")
    assert (found["state"], found["step"], found["steps"], found["restarts"]) == ("not started", None, 40, None)
    assert "0/40" in status("runs/small").output


def test_a_damaged_result_fails_its_stage_and_hides_no_other(run: MadeRun) -> None:
    run.note("pretrain", "begin", ranks=2)
    run.note("finetune", "begin", ranks=2)
    (run.stage("finetune").path / "result.json").write_text('{"stage": "finet')
    done = status("runs/small", "--json")
    states = {one["stage"]: (one["state"], one["reason"]) for one in json.loads(done.stdout)["stages"]}
    assert states["pretrain"][0] == "stopped"
    assert states["finetune"][0] == "failed"
    assert "finetune/result.json: damaged (Unterminated string" in states["finetune"][1]
    assert done.exit_code == 0


def test_json_has_all_values(run: MadeRun) -> None:
    run.freeze()
    run.submit("pretrain", "7")
    run.log("pretrain", START)
    run.note("pretrain", "begin", ago=60)
    run.note("pretrain", "save", ago=30, step=20)
    run.note("pretrain", "evaluation", step=20, top1=0.25)
    run.note("pretrain", "evaluation", step=30, top1=0.5)
    run.progress("pretrain", 30, 40, left=20, ago=5)
    with running(run, "pretrain"):
        result = json.loads(status("runs/small", "--json").stdout)
    assert "command not found" in result["slurm"]
    found = result["stages"][0]
    assert found.pop("checkpoint_age") == pytest.approx(30, abs=10)
    assert found.pop("seconds_left") == pytest.approx(15, abs=10)
    assert found.pop("updated") == pytest.approx(time.time() - 5, abs=10)
    assert found == {
        "run": "small", "stage": "pretrain", "job": "7", "state": "running", "reason": "", "slurm_state": None,
        "nodes": "node[1-2]", "step": 30, "steps": 40, "images_per_second": 512.0, "loss": 1.25, "top1": 0.5,
        "checkpoint": "step-00000020", "restarts": 0, "evaluations": [], "excluded_nodes": [], "faulty_nodes": [],
        "settings": {},
    }  # fmt: skip


@pytest.mark.parametrize("named", ["recipe.yaml", "runs/test", "runs", ".", None, "runs/test/slurm"])
def test_a_run_is_named_by_its_recipe_its_folder_or_one_above(
    run: MadeRun, named: str | None, shards: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path, shards)
    named_run = MadeRun(tmp_path, "test")
    named_run.freeze()
    found = rows(*([named] if named else []))
    assert [one["run"] for one in found] == ["test"] * len(found)
    assert [one["stage"] for one in found] == ["pretrain", "finetune"] + ["evaluate"] * (named == "recipe.yaml")


def test_one_stage_is_named_by_its_folder(run: MadeRun) -> None:
    run.freeze()
    run.finish("finetune")
    assert [one["stage"] for one in rows("runs/small/finetune")] == ["finetune"]


def test_without_a_recipe_stages_are_in_the_order_of_their_first_starts(run: MadeRun) -> None:
    for number, stage in enumerate(("pretrain", "finetune", "evaluate")):
        recipe = run.stage(stage).path / "recipe.yaml"
        recipe.write_text("task: train\n")
        os.utime(recipe, (number, number))
    assert [one["stage"] for one in rows("runs/small")] == ["pretrain", "finetune", "evaluate"]


def test_several_runs_share_one_table(run: MadeRun, tmp_path: Path) -> None:
    run.freeze()
    MadeRun(tmp_path, "large").finish("pretrain")
    shown = lines(status())
    assert shown[0][:3] == ["run", "stage", "state"]
    assert [line[:2] for line in shown if len(line) > 3][1:] == [
        ["large", "pretrain"], ["small", "pretrain"], ["small", "finetune"],
    ]  # fmt: skip


def test_other_folders_are_refused_and_an_empty_runs_folder_has_no_runs(run: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert status().output == "no runs yet\n"
    for wrong, message in (
        ("nothing", "not a recipe file or run folder"),
        ("runs", "not a run folder, and contains none"),
    ):
        result = status(wrong)
        assert result.exit_code == 78
        assert message in result.output


def test_a_stage_whose_checkpoint_is_gone_is_done_and_says_what_is_there(run: MadeRun) -> None:
    run.finish("pretrain")
    assert row("runs/small")["reason"] == ""
    shutil.rmtree(run.path / "pretrain/checkpoints/step-00000040")
    save(run.path / "pretrain", 5)
    freeze(run.path / "pretrain")
    found = row("runs/small")
    checkpoints = run.path / "pretrain/checkpoints"
    assert (found["state"], found["reason"]) == (
        "done",
        f"its checkpoint no longer exists, the newest one there is {checkpoints}/step-00000005",
    )


def test_shard_jobs_are_rows_and_done_when_the_shards_are_complete(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run.freeze()
    with open(run.submissions.recipe, "a") as recipe:
        recipe.write(f"shards:\n  folder: {tmp_path / 'shards'}\n")
    run.submit("shards", "5")
    run.submit("shards merge", "6")
    run.submit("pretrain", "7")
    slurm_reports(
        monkeypatch, SlurmJob("5", "COMPLETED"), SlurmJob("6", "RUNNING"), SlurmJob("7", "PENDING", "Dependency")
    )
    states = {"shards": "done", "shards merge": "running", "pretrain": "waiting", "finetune": "not started"}
    assert {one["stage"]: one["state"] for one in rows("runs/small")} == states
    slurm_reports(monkeypatch)
    assert [one["state"] for one in rows("runs/small")][:2] == ["cancelled", "cancelled"]
    (tmp_path / "shards").mkdir()
    assert [one["state"] for one in rows("runs/small")][:2] == ["done", "done"]


@pytest.mark.parametrize(
    ("ago", "left", "log", "reason"),
    [
        (30, 100, {}, ""),
        (100, 100, {}, "no step for 1 min"),
        (720, 100, {}, "no step for 12 min"),
        (720, 100, {"every_steps": 10}, ""),  # 100 s for ten steps
        (2000, 100, {"every_steps": 10}, "no step for 33 min"),
        (720, 100, "nothing", "no step for 12 min"),  # a recipe that somebody has edited
        (720, None, {}, "no step for 12 min"),
    ],
)
def test_a_run_that_logs_no_step_for_long_is_marked(
    run: MadeRun, ago: float, left: float | None, log: dict[str, int], reason: str
) -> None:
    run.freeze(pretrain={"task": "train", "log": log})
    run.note("pretrain", "begin", ago=3000)
    run.progress("pretrain", 30, 40, ago=ago, left=left)
    with running(run, "pretrain"):
        found = row("runs/small")
    assert found["reason"] == reason
    expected = None if reason or left is None else pytest.approx(max(0.0, left - ago), abs=10)
    assert found["seconds_left"] == expected


def test_a_start_without_a_step_shows_how_long_it_has_taken(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.freeze()
    run.note("pretrain", "begin", ago=2000)
    run.progress("pretrain", 30, 40, ago=1000, left=10)
    run.note("pretrain", "begin", ago=300)
    with running(run, "pretrain"):
        found = row("runs/small")
    assert (found["reason"], found["step"], found["images_per_second"]) == ("starting for 5 min", 30, None)
    assert found["seconds_left"] is None
    # A job whose ranks have not yet written to the event log.
    run.submit("pretrain", "7")
    run.log("pretrain", f"{at(120)} job 7: start 3 on node1, 8 tasks")
    slurm_reports(monkeypatch, SlurmJob("7", "RUNNING", "", "node1", starts=int(time.time()) - 120))
    assert row("runs/small")["reason"] == "starting for 2 min"


def test_a_run_after_its_last_step_is_saving_and_an_evaluation_shows_no_steps(run: MadeRun) -> None:
    run.freeze(pretrain={"task": "train"}, evaluate={"task": "evaluate"})
    run.note("pretrain", "begin", ago=3000)
    run.progress("pretrain", 40, 40, ago=2000, left=0)
    run.note("evaluate", "begin", ago=3000)
    with running(run, "pretrain"), running(run, "evaluate"):
        assert [one["reason"] for one in rows("runs/small")] == ["saving and evaluating", ""]


def test_the_end_of_a_run_without_slurm_is_explained(run: MadeRun) -> None:
    run.freeze()

    def ended() -> tuple[str, str]:
        found = row("runs/small")
        return found["state"], found["reason"]

    run.exit("pretrain", 78, "stage pretrain: no such shards", ago=90)
    assert ended() == ("failed", "stage pretrain: no such shards")
    run.note("pretrain", "begin", ago=80)
    assert ended() == ("stopped", "its processes ended without a message")
    run.exit("pretrain", 75, "rank 1 is gone", rank=0, ago=70)
    assert ended() == ("stopped", "rank 1 is gone")
    run.exit("pretrain", 1, "RuntimeError: no memory", rank=1, ago=70)
    assert ended() == ("failed", "RuntimeError: no memory")
    run.note("pretrain", "begin", ago=60)
    run.note("pretrain", "stop", reason="SIGTERM", step=1037, ago=50)
    assert ended() == ("stopped", "by SIGTERM after step 1,037")
    run.note("pretrain", "gave_up", starts=3, ago=40)
    assert ended() == ("failed", "gave up: 3 starts in a row ended without a new checkpoint")


def test_a_start_without_slurm_after_the_job_takes_precedence(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_reports(monkeypatch)
    run.freeze()
    run.submit("pretrain", "7", ago=1000)
    run.log("pretrain", START, f"{at(400)} job 7: failed with exit code 70, not requeued: not finite")
    run.note("pretrain", "begin", ago=450)
    assert (row("runs/small")["job"], row("runs/small")["state"]) == ("7", "failed")
    run.note("pretrain", "begin", ago=100)
    assert (row("runs/small")["job"], row("runs/small")["state"]) == (None, "stopped")
    with running(run, "pretrain"):
        assert (row("runs/small")["job"], row("runs/small")["state"]) == (None, "running")


def test_a_running_job_counts_even_if_its_log_is_late(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.freeze()
    run.submit("pretrain", "7", ago=1000)
    run.note("pretrain", "begin")
    slurm_reports(monkeypatch, SlurmJob("7", "RUNNING", "", "node1", starts=int(time.time()) - 20))
    assert (row("runs/small")["job"], row("runs/small")["state"]) == ("7", "running")


def test_the_newest_job_of_a_stage_counts(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.freeze()
    run.submit("pretrain", "7")
    run.submit("pretrain", "9")
    slurm_reports(monkeypatch, SlurmJob("7", "FAILED"), SlurmJob("9", "PENDING", "Priority"))
    assert (row("runs/small")["job"], row("runs/small")["state"]) == ("9", "waiting")


def test_status_disturbs_no_start_and_writes_nothing(run: MadeRun) -> None:
    run.freeze()
    run.stage("pretrain")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert row("runs/small")["state"] == "not started"
    with running(run, "pretrain"):
        for _ in range(3):  # the second call would meet a lock of the first
            assert row("runs/small")["state"] == "running"
    assert row("runs/small")["state"] != "running"
    (run.stage("pretrain").path / ".lock").touch()
    with open(run.stage("pretrain").path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as another `coatnet status` does
        assert row("runs/small")["state"] != "running"
    lock = run.stage("pretrain").path / ".lock"
    lock.unlink(missing_ok=True)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}.keys() == before.keys()


def test_a_long_reason_is_printed_in_full_below_the_table(run: MadeRun) -> None:
    run.freeze()
    message = "the shards of the validation set differ from those of the first start: restore them [or not]"
    run.note("pretrain", "begin")
    run.exit("pretrain", 78, message)
    shown = status("runs/small").output
    assert f"pretrain failed: {message}" in shown
    assert "the shards of the validation set differ fro…" in shown


@pytest.mark.parametrize(
    ("states", "settled"),
    [
        (["done", "done"], True),
        (["done", "running"], False),
        (["failed", "waiting"], False),
        (["failed", "not started"], True),
        (["done", "not started"], False),  # between two stages on this machine
        (["stopped", "cancelled"], True),
        (["unknown", "done"], False),
        ([], True),
    ],
)
def test_watching_ends_when_nothing_can_start_by_itself(run: MadeRun, states: list[str], settled: bool) -> None:
    run.freeze()
    one = stage_statuses(find_runs(Path("runs/small"))).stages[0]
    assert StatusReport([replace(one, state=state) for state in states], None).settled is settled  # type: ignore[arg-type]


def test_watch_prints_again_until_all_is_settled(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.freeze()
    run.finish("pretrain")
    answers = iter(
        [[SlurmJob("8", "PENDING", "Priority")], [SlurmJob("8", "RUNNING", "", "node1")], [SlurmJob("8", "TIMEOUT")]]
    )
    monkeypatch.setattr(slurm, "jobs", lambda numbers: {job.number: job for job in next(answers)} if numbers else {})
    run.submit("finetune", "8")
    result = status("runs/small", "--watch", "--every", "0.1")
    assert result.exit_code == 0
    assert re.findall(r"finetune +8 +(\w+)", result.output) == ["waiting", "running", "stopped"]
    answers = iter([[SlurmJob("8", "RUNNING", "", "node1")], [SlurmJob("8", "TIMEOUT")]])
    result = status("runs/small", "--watch", "--every", "0.1", "--json")
    assert [json.loads(line)["stages"][1]["state"] for line in result.output.splitlines()] == ["running", "stopped"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3720, "1 h 2 min"), (90000, "1 d 1 h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_times_are_formatted_as_a_clock() -> None:
    assert [clock(seconds) for seconds in (5, 110, 3661, 100000)] == ["0:05", "1:50", "1:01:01", "27:46:40"]


@pytest.mark.parametrize("again", [False, True])
def test_a_stage_that_was_extended_and_not_started_since_says_from_where_it_goes_on(run: MadeRun, again: bool) -> None:
    run.freeze()
    run.note("pretrain", "begin", ago=60, ranks=1)
    run.note("pretrain", "finish", ago=50)
    run.note("pretrain", "extend", ago=40, step=40, steps=60)
    if again:
        run.note("pretrain", "begin", ago=30, ranks=1)
    found = rows("runs/small")[0]
    reason = (
        "its processes ended without a message"
        if again
        else "goes on from step 40 with other settings when it is started"
    )
    assert (found["state"], found["reason"]) == ("stopped", reason)
