"""`coatnet doctor` with a real Slurm: which jobs it would accept, and the nodes checked by a job."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.submit import submit
from jobs.preflight import assess_recipe
from pipeline.plan import plan_stage
from pipeline.preflight.finding import Finding
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import run_folder
from tests.servers.slurm import SlurmCluster
from tests.support.command import coatnet, start, wait_until
from tests.support.recipes import write_recipe
from tests.support.records import stage_result

pytestmark = pytest.mark.slow

NODES = "there are: " + ", ".join(
    f"{partition} 4 x (4 processors, 4 GiB, gpu:4)" for partition in ("main", "low", "lowgrace", "high")
)
CPUS = {"ranks": 2, "nodes": 2, "gpus_per_rank": 0}


def requests(folder: Path, shards: Path, *overrides: str, stages: tuple[str, ...] = ("pretrain",)) -> list[Finding]:
    """The findings of Slurm about the jobs."""
    recipe = load_recipe(write_recipe(folder, shards, resources=CPUS), list(overrides))
    return [finding for finding in assess_recipe(recipe, stages, slurm=True) if "Slurm" in finding.what]


def test_accepted_jobs_are_reported_with_their_expected_start(
    shards: Path, tmp_path: Path, slurm: SlurmCluster
) -> None:
    first, second, clock = requests(tmp_path, shards, stages=("pretrain", "evaluate"))
    assert (first.where, second.where) == ("pretrain", "evaluate")
    for finding in (first, second):
        assert finding.level == "ok"
        assert finding.what.startswith("Slurm accepts the job: it would start at 20")
        assert finding.what.endswith(" on nodes node[1-2] in partition main")
    assert clock == Finding("ok", "", "clock: Slurm's controller agrees with this machine's")
    assert slurm.run("squeue", "--noheader") == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "reason", "fix"),
    [
        ("resources.nodes=9 resources.ranks=9", "Requested node configuration is not available", "request less (resources.nodes, ranks, cpus_per_rank, memory_gigabytes) or set resources.partition; " + NODES),
        ("resources.memory_gigabytes=900", "Requested node configuration is not available", "request less (resources.nodes, ranks, cpus_per_rank, memory_gigabytes) or set resources.partition; " + NODES),
        ("resources.partition=nope", "invalid partition specified: nope", "set resources.partition; there are: high, low, lowgrace, main"),
        ("resources.constraint=fast", "Invalid feature specification", "correct resources.constraint"),
        ("resources.flags=[--bogus=1]", 'unrecognized option \'--bogus=1\' Try "sbatch --help" for more information', "correct resources.flags"),
    ],
)  # fmt: skip
def test_a_refused_job_is_reported_with_the_available_resources(
    shards: Path, tmp_path: Path, slurm: SlurmCluster, override: str, reason: str, fix: str
) -> None:
    refused = requests(tmp_path, shards, "batch.global_size=18", "data.lanes=6", *override.split())[0]
    assert refused == Finding("error", "pretrain", f"Slurm refuses the job: {reason}", fix)


def test_a_job_that_needs_a_node_that_is_down_is_only_a_warning(
    shards: Path, tmp_path: Path, slurm: SlurmCluster
) -> None:
    slurm.fail_node("node4")
    refused = requests(tmp_path, shards, "batch.global_size=12", "resources.nodes=4", "resources.ranks=4")[0]
    assert refused.level == "warning"
    assert "is not available; 1 nodes are down or drained" in refused.what
    assert refused.fix.startswith("the job may wait for them; or request less")


def test_jobs_that_build_shards_are_checked_and_stages_that_are_done_are_not(
    shards: Path, tmp_path: Path, slurm: SlurmCluster
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.freeze(plan_stage(recipe, "pretrain"), None)
    folder.finish(stage_result("pretrain/checkpoints/step-00000040"))
    build = f"shards={{source: {tmp_path}, folder: built, resources: {{partition: nope}}}}"
    refused, _ = requests(tmp_path, shards, build)
    assert (refused.level, refused.where) == ("error", "shards")
    assert refused.what == "Slurm refuses the job: invalid partition specified: nope"


def test_a_controller_that_does_not_answer_is_reported(
    shards: Path, tmp_path: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.kill_controller()
    monkeypatch.setattr("jobs.scheduler.slurm._ANSWER_SECONDS", 2)
    (finding,) = requests(tmp_path, shards)
    assert (finding.level, finding.fix) == ("error", "try again later, or ask its administrators")
    assert finding.what.startswith("Slurm does not answer: sbatch: ")
    with pytest.raises(SystemExit) as ended:
        submit(tmp_path / "recipe.yaml")
    assert ended.value.code == 75


def test_commands_that_find_no_cluster_are_reported_once(
    shards: Path, tmp_path: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm.conf").touch()  # for a file that does not exist, Slurm waits a minute
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    recipe = write_recipe(tmp_path, shards)
    done = coatnet("doctor", recipe, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (finding,) = [one for one in json.loads(done.stdout) if "Slurm" in one["what"]]
    assert finding["level"] == "warning"
    assert finding["what"].startswith("Slurm's commands are on this machine and find no cluster")
    refused = coatnet("submit", recipe)
    assert refused.returncode == 78
    assert "find no cluster (Unable to process configuration file); use a machine of the cluster" in refused.stderr


@pytest.mark.slow(seconds=15)
def test_the_nodes_are_checked_by_a_job_with_the_resources_of_the_stage(
    shards: Path, tmp_path: Path, slurm: SlurmCluster
) -> None:
    recipe = write_recipe(tmp_path, shards, resources=CPUS)
    done = coatnet("doctor", recipe, "--nodes", "--seconds=0.3", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert [one for one in found if one["level"] != "ok"] == []
    assert [one["what"].partition(":")[0] for one in found[-5:]] == [
        "nodes", "all-reduce", "burn-in", "reading", "checkpoints",
    ]  # fmt: skip
    assert found[-5]["what"] == "nodes: 2 ranks on 2 agree in versions and clocks, and can start the stage"
    record = slurm.run("scontrol", "--oneliner", "show", "jobs")
    assert "JobName=test.doctor " in record
    assert "TimeLimit=00:10:00" in record
    assert "Requeue=0" in record


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_ending_the_command_cancels_its_job(
    shards: Path,
    tmp_path: Path,
    slurm: SlurmCluster,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    """Also while `sbatch`, slow here, has submitted the job and not yet said its number, and if Slurm ends the job long
    before `scancel` returns."""
    slurm.run("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    (tmp_path / "bin").mkdir()
    for program in ("sbatch", "scancel"):
        slow = tmp_path / "bin" / program
        slow.write_text(f'#!/bin/sh\nsaid=$({shutil.which(program)} "$@") || exit\nsleep 2\necho "$said"\n')
        slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    process = start("doctor", write_recipe(tmp_path, shards, resources=CPUS), "--nodes", "--seconds=600")
    wait_until(lambda: "test.doctor" in slurm.run("squeue", "--noheader", "--format=%j %T"), process)
    assert "test.doctor 30:00" in slurm.run("squeue", "--noheader", "--format=%j %l")  # twice 600 seconds more
    os.kill(process.pid, number)
    assert process.wait(300) == code
    assert "test.doctor" not in slurm.run("squeue", "--noheader", "--format=%j %T")


@pytest.mark.slow(seconds=15)
def test_a_job_that_ends_early_is_reported_with_the_last_line_of_its_log(
    shards: Path, tmp_path: Path, slurm: SlurmCluster
) -> None:
    recipe = write_recipe(tmp_path, shards, resources=CPUS)
    done = coatnet(
        "doctor", recipe, "--nodes", "--stage=pretrain", "--json",
        COATNET_CONTAINER="image", COATNET_CONTAINER_RUNTIME="docker",
    )  # fmt: skip
    assert done.returncode == 78, done.stdout + done.stderr
    found = json.loads(done.stdout)[-1]
    assert "ended as FAILED: " in found["what"]
    assert found["what"].endswith("COATNET_CONTAINER_RUNTIME is docker; it must be pyxis or apptainer")
    assert found["fix"] == f"see {tmp_path}/runs/test/doctor/pretrain.log"
