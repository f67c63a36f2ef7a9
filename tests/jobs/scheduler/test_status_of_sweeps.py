"""`coatnet status` of the runs of a sweep."""

import json
from pathlib import Path

import pytest

from tests.jobs.runs import MadeRun, at, lines, rows, running, status
from tests.support.recipes import write_recipe

START = f"{at(500)} job 7: start 0 on node[1-2], 8 tasks"
OTHERS = f"{at(900)} job 6: failed with exit code 78, not requeued: of another job"


@pytest.fixture
def sweep(run: MadeRun, tmp_path: Path) -> list[MadeRun]:
    """Two runs of one recipe, the first of which is ahead."""
    runs = [MadeRun(tmp_path, name) for name in ("test-a", "test-b")]
    settings = {"test-a": {"optimizer.peak_learning_rate": "5e-4"}, "test-b": {"optimizer.peak_learning_rate": "1e-3"}}
    for one in runs:
        one.freeze()
    (tmp_path / "runs/test/slurm").mkdir(parents=True)  # where `coatnet submit` has its lock
    (tmp_path / "runs/test.sweep.json").write_text(json.dumps({"runs": ["test-a", "test-b"], "settings": settings}))
    runs[0].finish("pretrain")
    runs[0].progress("finetune", 3, 6)
    runs[0].note("finetune", "begin", ago=10)
    runs[0].note("finetune", "evaluation", step=3, top1=0.25)
    return runs


@pytest.mark.parametrize("named", ["recipe.yaml", "runs/test", "runs/test.sweep.json"])
def test_the_runs_of_a_sweep_are_compared(sweep: list[MadeRun], named: str, shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    with running(sweep[0], "finetune"):
        shown = lines(status(named))
        found = rows(named)
    headings = "run optimizer.peak_learning_rate stage state reason step loss top-1 pretrain top-1 finetune"
    assert shown[0] == headings.split()
    assert shown[2] == ["test-a", "5e-4", "finetune", "running", "-", "3/6", "1.2500", "75.00%", "25.00%"]
    assert shown[3] == ["test-b", "1e-3", "pretrain", "not", "started", "-", "0/40", "-", "-", "-"]
    assert [(one["run"], one["settings"]["optimizer.peak_learning_rate"]) for one in found] == [
        ("test-a", "5e-4"), ("test-a", "5e-4"), ("test-b", "1e-3"), ("test-b", "1e-3"),
    ]  # fmt: skip


def test_a_run_of_a_sweep_is_shown_at_its_running_stage(sweep: list[MadeRun]) -> None:
    sweep[1].note("pretrain", "begin")
    sweep[1].note("finetune", "begin")
    with running(sweep[1], "finetune"):
        assert lines(status("runs/test"))[3][:4] == ["test-b", "1e-3", "finetune", "running"]
    assert lines(status("runs/test"))[3][:4] == ["test-b", "1e-3", "pretrain", "stopped"]


def test_a_recipe_that_was_also_run_outside_its_sweep_shows_both(
    sweep: list[MadeRun], shards: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path, shards)
    MadeRun(tmp_path, "test").note("pretrain", "begin")
    shown = lines(status("recipe.yaml"))
    assert shown[0][0] == "stage"
    assert ["run", "optimizer.peak_learning_rate"] in [line[:2] for line in shown]


def test_the_shard_jobs_of_a_sweep_have_a_table_of_their_own(
    sweep: list[MadeRun], shards: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path, shards)
    MadeRun(tmp_path, "test").submit("shards", "5")
    for named in ("recipe.yaml", "runs/test"):
        shown = lines(status(named))
        assert [line[:2] for line in shown if line[:1] in (["shards"], ["pretrain"])] == [["shards", "5"]]
        assert rows(named)[0]["stage"] == "shards"


def test_a_damaged_sweep_file_is_refused(run: MadeRun, tmp_path: Path) -> None:
    run.freeze()
    (tmp_path / "runs/test.sweep.json").write_text("[]")
    result = status("runs/test")
    assert result.exit_code == 78
    assert "not the record of a sweep" in result.output
