"""What a shell in another job, or one that outlived its job, leaves in the environment changes no job."""

import os
import socket
from pathlib import Path

import pytest

from jobs.scheduler.job_end import is_in_job
from tests.servers.slurm import SlurmCluster
from tests.slurm.chains import submit, submitted, write_chain
from tests.support.command import coatnet
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow(seconds=10)

INHERITED = {
    "SLURM_JOB_ID": "999", "SLURM_STEP_ID": "3", "SLURM_CPU_BIND": "quiet,mask_cpu:0x3", "SLURM_GPUS_PER_TASK": "1",
    "SLURM_MEM_PER_CPU": "2000", "SLURM_MEM_PER_NODE": "4000", "SQUEUE_PARTITION": "high",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.fixture
def inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of another job's step, and of torchrun."""
    for name, value in INHERITED.items():
        monkeypatch.setenv(name, value)


def record_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tasks of jobs record their environment instead of training."""
    program = folder / "record"
    program.write_text(f'#!/usr/bin/env bash\nenv | sort > "{folder}/task $RANK"\n')
    program.chmod(0o755)
    site = folder / "site.sh"
    site.write_text(f'env | sort > "{folder}/batch"; COATNET={program}\n')
    monkeypatch.setenv("COATNET_SITE", str(site))


def variables(file: Path) -> dict[str, str]:
    lines = [line.partition("=") for line in file.read_text().splitlines()]
    return {name: value for name, _, value in lines}


def test_submitted_jobs_get_nothing_of_the_job_they_are_submitted_from(
    slurm: SlurmCluster, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: None
) -> None:
    record_task(tmp_path, monkeypatch)
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    recipe = write_chain(tmp_path, shards)
    short = ("--no-doctor", "resources.nodes=1", "resources.ranks=1")
    said = coatnet("submit", recipe, *short)
    assert said.returncode == 0, said.stderr
    assert said.stderr.splitlines() == [
        "warning: environment: variables of Slurm job 999 are not passed on to the jobs: SLURM_CPU_BIND, "
        "SLURM_GPUS_PER_TASK, SLURM_MEM_PER_CPU, SLURM_MEM_PER_NODE and 2 more",
        "warning: environment: no effect of SBATCH_EXPORT; set resources in the recipe",
        "warning: environment: variables of a rank are not passed on to the jobs: TORCHELASTIC_USE_AGENT_STORE",
        "environment: SBATCH_PARTITION=low holds for jobs without resources.partition in the recipe",
    ]
    job = submitted(tmp_path / "runs")["pretrain"].job
    assert slurm.wait_for(job, "COMPLETED", "FAILED")["Partition"] == "low"
    log = (tmp_path / "runs" / "test" / "slurm" / "pretrain.log").read_text()
    assert [line.partition(": ")[2] for line in log.splitlines()] == ["start 0 on node1, 1 tasks", "done"]
    batch = variables(tmp_path / "batch")
    assert batch["SLURM_JOB_ID"] == job
    assert not batch.keys() & (INHERITED.keys() - {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU"})
    assert batch["SLURM_MEM_PER_CPU"] == "100"  # what Slurm says about this job


def test_a_printed_script_drops_them_too(slurm: SlurmCluster, shards: Path, tmp_path: Path, inherited: None) -> None:
    printed = submit(write_chain(tmp_path, shards), "--dry-run", "--no-doctor")
    assert printed.splitlines()[0] == f"unset {' '.join(sorted(INHERITED))}"


def test_a_job_submitted_by_hand_names_them_and_each_node_has_its_own_number_of_ranks(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: None
) -> None:
    record_task(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    size = ["--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    script = str(ROOT / "slurm" / "pretrain.sbatch")
    job = slurm.run("sbatch", "--parsable", "--output=log", *size, script, "recipe.yaml").strip()
    slurm.wait_for(job, "COMPLETED")
    said = [line.partition(": ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert [said[0], said[1], said[-1]] == [  # between them, srun warns that it ignores an option
        "without effect in the environment: SLURM_CPU_BIND SLURM_GPUS_PER_TASK TORCHELASTIC_USE_AGENT_STORE "
        "SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE",
        "start 0 on node[1-2], 3 tasks",
        "done",
    ]
    tasks = [variables(tmp_path / f"task {rank}") for rank in range(3)]
    assert [(task["LOCAL_RANK"], task["LOCAL_WORLD_SIZE"], task["SLURMD_NODENAME"]) for task in tasks] == [
        ("0", "2", "node1"),
        ("1", "2", "node1"),
        ("0", "1", "node2"),
    ]
    for task in tasks:
        assert not task.keys() & {"SLURM_CPU_BIND", "SLURM_GPUS_PER_TASK", "TORCHELASTIC_USE_AGENT_STORE"}


def test_a_process_is_in_a_job_while_that_runs_on_its_machine(slurm: SlurmCluster) -> None:
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600").strip()
    slurm.wait_for(job, "RUNNING")
    environment = dict(os.environ) | {"SLURM_JOB_ID": job}
    with pytest.MonkeyPatch.context() as patch:
        for name, is_there in (("node1", True), ("node2", False), ("login", False)):
            patch.setattr(socket, "gethostname", lambda name=name: name)
            assert is_in_job(environment) == is_there, name
        patch.setattr(socket, "gethostname", lambda: "node1")
        slurm.run("scancel", job)
        slurm.wait_for(job, "CANCELLED")
        assert not is_in_job(environment)
