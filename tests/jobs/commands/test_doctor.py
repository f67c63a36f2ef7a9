"""`coatnet doctor` on the command line, and its ranks on this machine."""

import contextlib
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from data.index import read_index
from jobs.commands.doctor import summary
from pipeline.monitoring.progress import StageProgress
from pipeline.preflight.finding import Finding
from pipeline.preflight.report import read_report
from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow

NOWHERE = "/nowhere"
"""A PATH without Slurm."""


def findings(*arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    done = coatnet("doctor", *arguments, "--json", PATH=NOWHERE)
    assert done.returncode == code, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def wrong(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in found if one["level"] != "ok"]


def test_the_exit_code_says_whether_there_are_errors(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    sound = coatnet("doctor", recipe, fresh=True, PATH=NOWHERE)
    assert (sound.returncode, sound.stdout.splitlines()[-1]) == (0, "0 errors, 0 warnings")
    assert "model: coatnet_debug at 48 pixels, fp32" in sound.stdout
    risky = coatnet("doctor", recipe, "data.workers=9", "resources.cpus_per_rank=2", PATH=NOWHERE)
    assert (risky.returncode, risky.stdout.splitlines()[-1]) == (0, "0 errors, 3 warnings")
    broken = coatnet("doctor", recipe, "resources.ranks=3", "--stage", "finetune", PATH=NOWHERE)
    assert (broken.returncode, broken.stdout.splitlines()[-1].partition(",")[0]) == (78, "1 error")
    assert "3 ranks do not divide the 4 micro-batches of a step" in broken.stdout
    assert "change resources.ranks or batch" in broken.stdout
    assert "pretrain" not in broken.stdout
    assert broken.stderr == ""


def test_an_invalid_recipe_is_reported_with_all_its_mistakes(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    text = recipe.read_text()
    recipe.write_text(text.replace("steps: 6", "stpes: 6").replace("lanes: 4", "lenes: 4"))
    unknown = findings(recipe, code=78)
    assert [one["what"].partition("unknown key ")[2] for one in unknown] == [
        "stages.pretrain.data.lenes", "stages.finetune.stpes"
    ]  # fmt: skip
    assert [one["fix"] for one in unknown] == ["did you mean lanes?", "did you mean steps?"]
    recipe.write_text(text.replace("lanes: 4", "lanes: four"))
    mistyped = findings(recipe, "seed=-1", code=78)
    assert [one["what"].partition(": ")[2] for one in mistyped] == [
        "seed: input should be greater than or equal to 0, not -1",
        "stages.pretrain.data.lanes: input should be a valid integer, not 'four'",
    ]


def test_the_summary_counts_errors_and_warnings() -> None:
    levels = [Finding(level, "", "") for level in ("error", "warning", "error", "ok")]
    assert summary(levels) == "2 errors, 1 warning"


def test_the_ranks_of_a_stage_check_this_machine(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 2, "gpus_per_rank": 0})
    found = findings(recipe, "--nodes", "--seconds", "0.3")
    assert wrong(found) == []
    tried = found[-5:]
    assert {one["where"] for one in tried} == {"pretrain"}
    assert tried[0]["what"] == "nodes: 2 ranks on 1 agree in versions and clocks, and can start the stage"
    for one, beginning, ending in zip(
        tried[1:],
        ("all-reduce: ", "burn-in: 2 ranks computed one micro-batch ", "reading: ", "checkpoints: "),
        ("of a step", " s", "by 2 ranks", "s for one"),
        strict=True,
    ):
        assert one["what"].startswith(beginning)
        assert one["what"].endswith(ending)
    # It leaves the recipe as it was checked, logs and findings, and nothing where the run will be.
    assert [path.name for path in (tmp_path / "runs/test").iterdir()] == ["doctor"]
    assert (tmp_path / "runs/test/doctor/pretrain/logs/rank-00001.log").exists()


@pytest.mark.parametrize(
    ("ranks", "repetitions", "wrong_ranks", "what", "fix"),
    [
        (3, "all", [1], "always computes other bits than most of 2 others of its kind, in loss", "drain the node"),
        (2, "1", [1], "computed other bits than itself in 1 of ", "drain the node (scontrol update NodeName="),
        (2, "all", [0, 1], "computes other bits than 1 other of its kind, in loss", "check with more nodes to find"),
    ],
    ids=["always", "once", "undecided"],
)
def test_a_rank_that_computes_wrong_values_is_named_before_the_run_begins(
    shards: Path, tmp_path: Path, ranks: int, repetitions: str, wrong_ranks: list[int], what: str, fix: str
) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": ranks, "gpus_per_rank": 0})
    done = coatnet(
        "doctor", recipe, "--nodes", "--seconds=0.3", "--stage=pretrain", "--json", "batch.global_size=18", "data.lanes=6",
        PATH=NOWHERE,
        TEST_IMPORTS="tests.support.wrong_bits", TEST_WRONG_RANK="1", TEST_WRONG_REPETITIONS=repetitions,
    )  # fmt: skip
    assert done.returncode == 78, done.stdout + done.stderr
    errors = [one for one in json.loads(done.stdout) if one["level"] == "error"]
    for rank, finding in zip(wrong_ranks, errors, strict=True):
        assert finding["what"].startswith(f"burn-in: rank {rank} on {socket.gethostname()} (")
        assert what in finding["what"]
        assert finding["fix"].startswith(fix)
        assert f"--exclude={socket.gethostname()}]" in finding["fix"]


def test_the_readers_must_match_the_speed_of_an_earlier_start(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 1, "gpus_per_rank": 0})
    folder = tmp_path / "runs/test/finetune"
    folder.mkdir(parents=True)
    StageProgress.now(3, 6, loss=1.0, images_per_second=1e9, seconds_left=None).write(folder / "progress.json")
    found = findings(recipe, "--nodes", "--seconds", "0.3", "--stage", "finetune")
    reading, writing = wrong(found)
    assert reading["what"].endswith("images/s by 1 ranks, and training needs 1,000,000,000 (as in an earlier start)")
    assert writing["what"].endswith("s (as in an earlier start)")
    assert not any(one["what"].startswith("all-reduce") for one in found)  # one rank exchanges nothing


def test_problems_that_only_ranks_notice_are_reported_with_the_node(shards: Path, tmp_path: Path) -> None:
    """There are no GPUs; the all-reduce is measured anyway."""
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 2})
    found = findings(recipe, "--nodes", "--seconds", "0.3", "--stage", "evaluate", code=78)
    (finding,) = wrong(found)
    assert finding["what"].startswith("GPUs: 2 of 2 ranks have none, on ")
    assert found[-1]["what"].startswith("all-reduce: ")


def test_a_checkpoint_folder_that_ranks_cannot_write_is_reported(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 1, "gpus_per_rank": 0})
    found = findings(recipe, "--nodes", "--seconds", "0.3", "--stage", "pretrain", "checkpoint.folder=/proc", code=78)
    here, there = wrong(found)
    assert here["what"] == "checkpoints: /proc cannot be written (No such file or directory)"
    assert there["what"].startswith("checkpoints: [Errno 2] No such file or directory: '/proc/.doctor-")


def test_a_damaged_shard_is_reported_by_the_readers(shards: Path, tmp_path: Path) -> None:
    copy = copytree(shards, tmp_path / "copy")
    middle = copy / "train" / read_index(copy / "train").shards[3].name
    middle.write_bytes(b"?" * middle.stat().st_size)
    recipe = write_recipe(tmp_path, copy, resources={"ranks": 1, "gpus_per_rank": 0})
    (finding,) = wrong(findings(recipe, "--nodes", "--seconds", "1", "--stage", "pretrain", code=78))
    assert finding["what"].startswith("reading: ")
    assert middle.name in finding["what"]


def test_a_stage_for_several_machines_needs_slurm(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 2, "nodes": 2, "gpus_per_rank": 0})
    (finding,) = wrong(findings(recipe, "--nodes", code=78))
    assert finding["what"] == "resources.nodes is 2, but this command starts ranks on one machine"


def test_a_rank_that_dies_ends_the_check_and_earlier_findings_are_reported(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 2, "gpus_per_rank": 0})
    folder = tmp_path / "runs/test/doctor"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(findings, recipe, "--nodes", "--seconds", "600", code=78)
        deadline = time.monotonic() + 120
        while not any(finding.what.startswith("all-reduce") for finding in read_report(folder / "pretrain.jsonl")[0]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(writer_of(folder / "pretrain/logs/rank-00001.log"), signal.SIGKILL)
        found = answer.result()
    (finding,) = wrong(found)
    assert finding["what"].startswith("the node check ended early: rank 1 was killed by SIGKILL")
    assert finding["fix"] == f"see the logs in {folder}/pretrain/logs"
    assert found[-2]["what"].startswith("all-reduce: ")


def writer_of(log: Path) -> int:
    """The process whose standard error a file is."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "fd/2").readlink() == log:
                return int(process.name)
    raise AssertionError(f"no process writes {log}")
