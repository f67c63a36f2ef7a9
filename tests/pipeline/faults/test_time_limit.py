"""When a start must be over: the recipe, Slurm's variables and Slurm's squeue, and the margin that a run learns."""

import os
import time
from pathlib import Path

import pytest

from pipeline.faults.time_limit import STARTED, Margin, TimeLimit, time_limit

BEGAN = 1_000_000.0
JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("limit_seconds", "environment", "end"),
    [
        (None, {}, None),
        (60.0, {}, BEGAN + 60),
        (60.0, {STARTED: str(BEGAN - 20)}, BEGAN + 40),
        (None, {"SLURM_JOB_END_TIME": "1000500"}, 1_000_500.0),
        (600.0, {"SLURM_JOB_END_TIME": "1000500"}, 1_000_500.0),
        (60.0, {"SLURM_JOB_END_TIME": "1000500"}, BEGAN + 60),
        (60.0, {"SLURM_JOB_END_TIME": "NONE"}, BEGAN + 60),
    ],
    ids=["none", "recipe", "launcher", "slurm", "slurm-first", "recipe-first", "slurm-none"],
)
def test_the_earlier_of_recipe_and_slurm_counts(
    limit_seconds: float | None, environment: dict[str, str], end: float | None
) -> None:
    limit = time_limit(limit_seconds, BEGAN, environment)
    assert (limit.end if limit else None) == end


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("echo 2026-11-22T08:00:05", "2026-11-22T08:00:05"),
        ("echo NONE", None),
        ("echo N/A", None),
        ("true", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
    ],
)
def test_squeue_is_asked_where_slurm_has_not_said_it(answer: str, end: str | None, tmp_path: Path) -> None:
    """A program in the place of squeue, which needs a cluster, with the answers that it gives."""
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\necho $SLURM_TIME_FORMAT $* > {tmp_path}/asked\n{answer}\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    limit = time_limit(None, BEGAN, JOB | {"PATH": path, "SLURM_TIME_FORMAT": "relative"})
    assert (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(limit.end)) if limit else None) == end
    assert (tmp_path / "asked").read_text() == "standard --noheader --jobs=7 --format=%e\n"
    time_limit(None, BEGAN, JOB | {"PATH": path, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"})
    assert "--jobs=5_3" in (tmp_path / "asked").read_text()


def test_a_node_without_squeue_has_no_limit(tmp_path: Path) -> None:
    assert time_limit(None, BEGAN, JOB | {"PATH": str(tmp_path)}) is None


def test_the_margin_is_two_of_the_longest_steps_the_longest_save_and_half_a_minute() -> None:
    margin = Margin()
    assert margin.seconds == 30
    for seconds in (2.0, 5.0, 3.0):
        margin.step_took(seconds)
    for seconds in (7.0, 4.0):
        margin.save_took(seconds)
    assert margin.seconds == 2 * 5 + 7 + 30


def test_a_limit_is_near_when_no_more_than_the_needed_time_is_left() -> None:
    limit = TimeLimit(time.time() + 1000)
    assert not limit.near(900)
    assert limit.near(1000)
