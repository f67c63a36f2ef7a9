"""The tests' Slurm cluster behaves as tests expect."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.servers.slurm import SlurmCluster, parse_job
from tests.support.paths import ROOT

START_AND_WAIT = """
import sys, time
from pathlib import Path
from tests.servers.slurm import SlurmCluster

cluster = SlurmCluster(Path(sys.argv[1]))
cluster.start()
job = cluster.run("sbatch", "--parsable", "--output=/dev/null", sys.argv[2]).strip()
cluster.wait_for(job, "RUNNING")
print(cluster.environment["SLURM_CONF"], flush=True)
time.sleep(600)
"""


def test_values_in_the_record_of_a_job_may_contain_anything() -> None:
    record = (
        "JobId=7 ArrayJobId=6 ArrayTaskId=1 JobName=a Name=b c\n   JobState=RUNNING Reason=None Dependency=(null)\n"
        "   NtasksPerN:B:S:C=0:0:*:* CoreSpec=*\n   Command=/a b/c.sh --x=1 Y=2\n   Comment=one\ntwo\n   Power=\n\n\n"
        "JobId=6 ArrayJobId=6 JobName=d\n   JobState=PENDING\n"
    )
    job = parse_job(record)
    assert job["JobName"] == "a Name=b c"
    assert (job["JobId"], job["ArrayTaskId"], job["JobState"], job["Reason"]) == ("7", "1", "RUNNING", "None")
    assert (job["NtasksPerN:B:S:C"], job["CoreSpec"], job["Power"]) == ("0:0:*:*", "*", "")
    assert (job["Command"], job["Comment"]) == ("/a b/c.sh --x=1 Y=2", "one\ntwo")


@pytest.mark.slow
def test_tasks_see_the_names_of_their_nodes(slurm: SlurmCluster) -> None:
    printed = slurm.run(
        "srun", "--nodes=2", "--gpus-per-node=4", "sh", "-c", 'echo "$(hostname) $SLURM_PROCID $CUDA_VISIBLE_DEVICES"'
    )
    assert sorted(printed.splitlines()) == ["node1 0 0,1,2,3", "node2 1 0,1,2,3"]


@pytest.mark.slow(seconds=8)
def test_a_job_whose_node_lost_power_runs_again_on_others(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = _script(tmp_path, "srun sleep 600")
    job = slurm.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", script).strip()
    assert slurm.wait_for(job, "RUNNING")["NodeList"] == "node[1-2]"
    before = _await_process(lambda: slurm.processes("node2"), "sleep")
    slurm.fail_node("node2")
    assert psutil.wait_procs(before, 0)[1] == []
    slurm.requeue_now(job)
    again = slurm.wait_for(job, "RUNNING")
    assert (again["Restarts"], "node2" in slurm.run("scontrol", "show", "hostnames", again["NodeList"])) == ("1", False)

    slurm.kill_controller()
    slurm.reset()
    assert slurm.run("squeue", "--noheader") == ""
    assert slurm.run("sinfo", "--noheader", "--partition=main", "--format=%N %T").split() == ["node[1-4]", "idle"]


@pytest.mark.slow
def test_no_process_outlives_a_killed_session(slurm: SlurmCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START_AND_WAIT, str(tmp_path / "slurm"), _script(tmp_path, "sleep 600")]
    session = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert session.stdout is not None
        link = Path(session.stdout.readline().decode()).parent
        _await_process(lambda: psutil.Process(session.pid).children(recursive=True), "sleep")
        processes = psutil.Process(session.pid).children(recursive=True)
        assert {"munged", "slurmctld", "slurmd", "slurmstepd"} <= {process.name() for process in processes}
    finally:
        session.kill()
        session.wait()
    assert psutil.wait_procs(processes, 10)[1] == []
    link.unlink()
    link.parent.rmdir()


@pytest.mark.slow(seconds=8)
def test_accounting_lists_a_job(slurm_accounting: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_accounting.run("sbatch", "--parsable", "--output=/dev/null", _script(tmp_path, "exit 3")).strip()
    slurm_accounting.wait_for(job, "FAILED")
    command = ("sacct", "-XPn", "-j", job, "-o", "JobID,State,ExitCode")
    slurm_accounting.wait_until(lambda: slurm_accounting.run(*command) == f"{job}|FAILED|3:0\n")


def _script(folder: Path, line: str) -> str:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/sh\n{line}\n")
    return str(path)


def _await_process(processes: Callable[[], list[psutil.Process]], name: str) -> list[psutil.Process]:
    deadline = time.monotonic() + 300
    while not (found := [process for process in processes() if _name(process) == name]):
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.1)
    return found


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return ""
