"""A job of which a node computes wrong values comes back without that node: `slurm/launch.sh` after exit code 71."""

import json
import os
import shutil
import stat
import sys
import time
from pathlib import Path

import pytest

from tests.servers.slurm import SlurmCluster
from tests.slurm.chains import submit as submit_chain
from tests.slurm.chains import submitted, write_chain
from tests.slurm.submitted import Submit, text_of
from tests.support import faulty_node
from tests.support.command import coatnet
from tests.support.recipes import events

pytestmark = pytest.mark.slow(seconds=10)

ONCE = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0'
"""For a task that does the rest at its first start only."""


def faulty(*nodes: str) -> str:
    """Lines of shell by which a rank says which nodes compute wrong values, as `jobs/exit_codes.py` does, and ends."""
    names = "".join(f"printf '%s\\n' {node} >> \"$COATNET_FAULTY_NODES_FILE\"\n" for node in nodes)
    return f'touch "$COATNET_BEGUN_FILE"\n{names}printf "71\\nwrong bits\\n" > "$COATNET_CAUSE_FILE"\nexit 71'


def log_of(folder: Path, job: str) -> list[str]:
    """The lines that launch.sh itself wrote about a job."""
    return [line.partition(f" job {job}: ")[2] for line in text_of(folder).splitlines() if f" job {job}: " in line]


def excluded(slurm: SlurmCluster, job: str) -> str:
    return slurm.job(job)["ExcNodeList"]


def test_the_job_and_those_that_wait_for_it_go_on_without_the_node_and_those_excluded_before(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    # Slurm does not end a task that it has yet to start, so rank 0 begins before rank 1 ends.
    task = f'{ONCE}\nif [ "$RANK" = 0 ]; then touch begun; exec sleep 600; fi\nuntil [ -e begun ]; do sleep 0.1; done\n'
    job = submit(task + faulty("node2"), "recipe.yaml", options=("--exclude=node4", "--hold"))
    held = ["sbatch", "--parsable", "--output=/dev/null", "--wrap=true"]
    next_ = slurm.run(*held, f"--dependency=afterok:{job}", "--exclude=node[3-4]").strip()
    last = slurm.run(*held, f"--dependency=afterok:{next_}").strip()
    other = slurm.run(*held, "--begin=now+600").strip()
    slurm.run("scontrol", "release", job)
    slurm.wait_until(lambda: "its next start" in text_of(tmp_path))
    assert [excluded(slurm, one) for one in (job, next_, last, other)] == [
        "node4,node2",
        "node[3-4],node2",
        "node2",
        "(null)",
    ]
    slurm.wait_for_restart(job)
    slurm.wait_for(job, "COMPLETED")
    assert log_of(tmp_path, job) == [
        "start 0 on node[1-2], 2 tasks",
        f"job {next_}, which waits for this one, is without node2, too",
        f"job {last}, which waits for this one, is without node2, too",
        "requeued: wrong bits",
        "its next start is without node2",
        "start 1 on node[1,3], 2 tasks",
        "done",
    ]
    assert list(tmp_path.glob(".coatnet-job-*")) == []


def test_a_task_of_an_array_goes_on_without_the_node_and_the_other_tasks_as_they_were(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    task = f'{ONCE}\n[ "$SLURM_ARRAY_TASK_ID" = 2 ] || exit 0\n' + faulty('"$SLURMD_NODENAME"')
    number = submit(task, "recipe.yaml", options=("--array=1-2", "--nodes=1"))
    slurm.wait_until(lambda: "its next start is without" in text_of(tmp_path))
    (start,) = [line for line in log_of(tmp_path, f"{number}_2") if line.startswith("start 0 on ")]
    node = start.split()[3].rstrip(",")
    assert excluded(slurm, f"{number}_2") == node
    assert excluded(slurm, f"{number}_1") == "(null)"


@pytest.mark.parametrize(
    ("names", "ignored"),
    [
        ((), ""),
        (
            ("'node9'", "'node1;touch ran'", "'$(touch ran)'", "'node[1-4]'"),
            "ignored: the faulty node node9 is none of this job",
        ),
    ],
    ids=["undecided", "no nodes of this job"],
)
def test_a_job_without_a_node_to_exclude_is_not_requeued(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, names: tuple[str, ...], ignored: str
) -> None:
    job = slurm.wait_for(number := submit(faulty(*names), "recipe.yaml", options=("--nodes=1",)), "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("71:0", "0")
    assert log_of(tmp_path, number)[-1] == "failed with exit code 71, not requeued: wrong bits"
    assert text_of(tmp_path).count("ignored: the faulty node ") == len(names)
    assert ignored in text_of(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert list(tmp_path.glob(".coatnet-job-*")) == []


def test_a_job_that_is_cancelled_meanwhile_is_not_requeued(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    wait = 'trap "touch cancelled" TERM\ntouch running\nuntil [ -e cancelled ]; do sleep 0.1; done\n'
    job = submit(wait + faulty("node1"), "recipe.yaml", options=("--nodes=1",))
    slurm.wait_until((tmp_path / "running").exists)
    slurm.run("scancel", job)
    slurm.wait_until(lambda: len(log_of(tmp_path, job)) == 2)
    assert log_of(tmp_path, job)[1] == "ended as COMPLETING None: wrong bits"
    assert slurm.wait_for(job, "CANCELLED")["Restarts"] == "0"


def with_failing_updates(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Put a `scontrol` on PATH that fails the first times a job is updated: a real controller does when it wants to."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "scontrol"
    count = f'case "$SLURM_JOB_ID $*" in [0-9]*" update "*) echo >> "{folder}/updates"; [ "$(wc -l < "{folder}/updates")" -gt {times} ] || exit 1;; esac'
    program.write_text(f'#!/bin/sh\n{count}\nexec {shutil.which("scontrol")} "$@"\n')
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")


def test_an_exclusion_that_fails_is_tried_again(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_failing_updates(tmp_path, monkeypatch, 1)
    job = submit(f"{ONCE}\n{faulty('node1')}", "recipe.yaml", options=("--nodes=1",))
    slurm.wait_until(lambda: "its next start" in text_of(tmp_path))
    assert log_of(tmp_path, job)[1:] == ["requeued: wrong bits", "its next start is without node1"]
    assert excluded(slurm, job) == "node1"


@pytest.mark.slow(seconds=20)
def test_a_job_comes_back_even_if_nothing_can_be_excluded_and_its_log_says_so(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_failing_updates(tmp_path, monkeypatch, 9)
    job = submit(f"{ONCE}\n{faulty('node1')}", "recipe.yaml", options=("--nodes=1", "--hold"))
    dependency = ("sbatch", "--parsable", "--output=/dev/null", "--wrap=true", f"--dependency=afterok:{job}")
    later = slurm.run(*dependency).strip()
    slurm.run("scontrol", "release", job)
    slurm.wait_until(lambda: "its next start" in text_of(tmp_path))
    slurm.wait_for_restart(job)
    slurm.wait_for(job, "COMPLETED")
    assert log_of(tmp_path, job)[1:] == [
        f"job {later}, which waits for this one, may still run on node1",
        "requeued: wrong bits",
        "its next start may be on node1 again, which could not be excluded",
        "start 1 on node1, 1 tasks",
        "done",
    ]


@pytest.mark.slow(seconds=18)
def test_a_job_ends_after_three_starts_with_faulty_nodes_before_the_run_began(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    task = faulty('"$SLURMD_NODENAME"').replace('touch "$COATNET_BEGUN_FILE"', "")
    job = submit(task, "recipe.yaml", options=("--nodes=1",))
    for restart in (1, 2):
        slurm.wait_until(lambda: text_of(tmp_path).count("its next start") == restart)  # noqa: B023
        slurm.wait_for_restart(job, restart)
    assert slurm.wait_for(job, "FAILED")["ExitCode"] == "70:0"
    assert excluded(slurm, job) == "node1,node2"
    assert log_of(tmp_path, job)[-1] == "failed: 3 starts in a row ended before the run began (wrong bits)"


@pytest.fixture
def faulty_node2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On node2, the first micro-batch of step 3 has a wrong gradient, where steps 1 and 3 are checked."""
    program = tmp_path / "coatnet"
    program.write_text(
        f"#!{sys.executable}\nimport tests.support.faulty_node\nfrom jobs.__main__ import main\nmain()\n"
    )
    program.chmod(stat.S_IRWXU)
    (tmp_path / "site.sh").write_text(f"COATNET={program}\n")
    monkeypatch.setenv("COATNET_SITE", str(tmp_path / "site.sh"))
    monkeypatch.setenv(faulty_node.NODE, "node2")
    # One of its neighbour's and two of its own in step 1, two in step 2, one of its neighbour's in step 3.
    monkeypatch.setenv(faulty_node.COMPUTATION, "6")


@pytest.mark.slow(seconds=30)
@pytest.mark.usefixtures("faulty_node2")
def test_a_chain_goes_on_without_a_node_that_computes_wrong_values_and_says_so(
    slurm: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    recipe, run = write_chain(tmp_path, shards), tmp_path / "runs" / "test"
    settings = [
        "pretrain.steps=5",
        "pretrain.checkpoint.every_steps=1",
        "pretrain.verify.every_steps=3",
        "finetune.resources.flags=[--hold, -xnode4]",
    ]
    began = time.time()
    submit_chain(recipe, *settings, "--no-doctor")
    jobs = submitted(tmp_path / "runs")
    job, held, last = (jobs[stage].job for stage in ("pretrain", "finetune", "evaluate"))
    log = run / "slurm" / "pretrain.log"
    slurm.wait_until(lambda: log.exists() and "its next start" in log.read_text())
    assert [excluded(slurm, one) for one in (job, held, last)] == ["node2", "node4,node2", "node2"]

    report = json.loads(coatnet("status", recipe, "--json").stdout)
    for row in report["stages"]:
        (node,) = row["excluded_nodes"]
        assert {name: node[name] for name in ("name", "stage", "step", "kinds")} == {
            "name": "node2", "stage": "pretrain", "step": 3, "kinds": ["gradient"],
        }  # fmt: skip
        assert began - 1 < node["since"] <= time.time()
        assert row["faulty_nodes"] == []
    shown = " ".join(coatnet("status", recipe).stdout.split())
    assert (
        "pretrain; finetune; evaluate: without node2: it computed wrong values in step 3 of pretrain (gradient, 20"
        in shown
    )

    slurm.wait_for_restart(job)
    assert "2" not in slurm.wait_for(job, "COMPLETED")["NodeList"]
    assert [entry["event"] for entry in events(run / "pretrain")].count("begin") == 2
    assert (run / "pretrain" / "result.json").exists()

    assert submit_chain(recipe, *settings, "--no-doctor").count("left alone") == 2
    slurm.run("scancel", held)
    slurm.wait_for(last, "CANCELLED")
    done = coatnet("submit", recipe, *settings, "--no-doctor")
    assert (
        "test: new jobs are without node2: it computed wrong values in step 3 of pretrain (gradient, 20" in done.stderr
    )
    assert "); once it is repaired, --all-nodes submits jobs that may use it\n" in done.stderr
    again = submitted(tmp_path / "runs")
    assert [excluded(slurm, again[stage].job) for stage in ("finetune", "evaluate")] == ["node[2,4]", "node2"]
    for stage in ("finetune", "evaluate"):
        slurm.run("scancel", again[stage].job)
        slurm.wait_for(again[stage].job, "CANCELLED")

    allowed = coatnet("submit", recipe, *settings, "--no-doctor", "--all-nodes")
    assert "test: new jobs may run on node2: it computed wrong values" in allowed.stderr
    again = submitted(tmp_path / "runs")
    assert [excluded(slurm, again[stage].job) for stage in ("finetune", "evaluate")] == ["node4", "(null)"]
    shown = " ".join(coatnet("status", recipe).stdout.split())
    assert "finetune; evaluate: may run on node2: it computed wrong values in step 3 of pretrain" in shown


def test_doctor_asks_slurm_whether_there_are_enough_nodes_without_the_faulty_ones(
    slurm: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    recipe = write_chain(tmp_path, shards, batch={"global_size": 12, "micro_size": 3})
    folder = tmp_path / "runs" / "test" / "pretrain"
    folder.mkdir(parents=True)
    entry = {
        "time": "2026-11-30T06:00:00+0000",
        "event": "machine_faulty",
        "step": 3,
        "kinds": ["loss"],
        "nodes": ["node2"],
    }
    (folder / "events.jsonl").write_text(json.dumps(entry) + "\n")
    all_four = ["resources.nodes=4", "resources.ranks=4", "--dry-run"]
    refused = coatnet("submit", recipe, *all_four)
    assert refused.returncode == 78
    assert "Requested node configuration is not available; request less" in refused.stderr
    assert "; it is without node2, which `coatnet submit --all-nodes` takes" in refused.stderr
    allowed = coatnet("submit", recipe, *all_four, "--all-nodes")
    assert allowed.returncode == 0, allowed.stderr
    assert "--exclude" not in allowed.stdout
