"""A run on a cluster that meets every fault of one, and ends as if nothing had happened."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.servers.slurm import SlurmCluster
from tests.slurm.chains import submit, submitted, write_chain
from tests.support.command import coatnet
from tests.support.recipes import checkpoint_bytes, events, scalars, write_recipe

pytestmark = pytest.mark.slow(seconds=90)
STEPS = 260
SETTINGS = [f"pretrain.steps={STEPS}", "pretrain.checkpoint.every_steps=3"]
FINAL = f"checkpoints/step-{STEPS:08d}"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same pretraining on one machine."""
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), shards)
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "runs" / "test" / "pretrain"


class Job:
    """A submitted pretraining."""

    def __init__(self, slurm: SlurmCluster, recipe: Path, *settings: str) -> None:
        self.slurm = slurm
        submit(recipe, *SETTINGS, *settings)
        self.number = submitted(recipe.parent / "runs")["pretrain"].job
        self.run = recipe.parent / "runs" / "test" / "pretrain"
        self.log = recipe.parent / "runs" / "test" / "slurm" / "pretrain.log"
        self.starts = 1

    def wait_for_steps(self, count: int = 3) -> None:
        """Wait until this start has taken some steps and saved."""

        def saves() -> int:
            entries = events(self.run) if (self.run / "events.jsonl").exists() else []
            starts = [n for n, entry in enumerate(entries) if entry["event"] == "begin"]
            here = entries[starts[-1] :] if len(starts) == self.starts else []
            return sum(entry["event"] == "save" for entry in here)

        self.slurm.wait_until(lambda: saves() >= count)

    def await_restart(self) -> None:
        """Wait until this start is over, and let the next one start at once."""
        self.slurm.wait_for_restart(self.number, self.starts)
        self.starts += 1

    def rank(self, node: str) -> psutil.Process:
        """The rank on a node."""
        ranks = [one for one in self.slurm.processes(node) if one.name().startswith(("python", "coatnet"))]
        frozen = self.log.parents[1] / "recipes"
        return next(rank for rank in ranks if Path(rank.cmdline()[-2]).parent == frozen)


def test_a_run_survives_whatever_a_cluster_does_to_it(
    slurm: SlurmCluster, undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_chain(tmp_path, shards)
    job = Job(slurm, recipe, "pretrain.resources.partition=low", "finetune.resources.flags=[--hold]")

    job.wait_for_steps()
    job.rank("node2").kill()
    job.await_restart()

    job.wait_for_steps()
    slurm.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.await_restart()

    # A save is made every three steps: many are in flight when the power goes.
    job.wait_for_steps()
    slurm.fail_node(slurm.job(job.number)["NodeList"].replace("[", "").partition("-")[0].partition(",")[0])
    job.await_restart()

    job.wait_for_steps()
    slurm.wait_until(lambda: any(job.run.glob("checkpoints/.*step*")) or (job.run / "result.json").exists())
    slurm.fail_node("node2" if "2" in slurm.job(job.number)["NodeList"] else "node3")
    job.await_restart()
    slurm.start_node("node1")

    job.wait_for_steps()
    slurm.kill_controller()
    slurm.start_controller()

    slurm.wait_for(job.number, "COMPLETED")
    assert (job.run / "result.json").exists()
    begun = [entry for entry in events(job.run) if entry["event"] == "begin"]
    assert len(begun) == job.starts == 5
    assert checkpoint_bytes(job.run / FINAL) == checkpoint_bytes(undisturbed / FINAL)
    assert scalars(job.run, "train/loss") == scalars(undisturbed, "train/loss")


def test_a_run_longer_than_its_time_limit_requeues_itself_as_often_as_it_takes(
    slurm: SlurmCluster, undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    steps = 2
    recipe = write_chain(tmp_path, shards)
    # Slurm counts minutes; of the half minute that the recipe allows, nothing is left after a step.
    short = [f"pretrain.steps={steps}", "pretrain.optimizer.warmup_steps=1", "resources.nodes=1", "resources.ranks=1"]
    job = Job(slurm, recipe, *short, "pretrain.resources.time_limit=0:00:30", "finetune.resources.flags=[--hold]")
    for _ in range(steps):  # after the last one it evaluates, however near the limit is
        job.await_restart()
    slurm.wait_for(job.number, "COMPLETED")
    reasons = [entry["reason"] for entry in events(job.run) if entry["event"] == "stop"]
    assert reasons == ["the time limit"] * steps
    assert f"requeued: stopped by the time limit after step 1, saved as step-{1:08d} in " in job.log.read_text()

    alone = write_recipe(tmp_path / "alone", shards)
    done = coatnet("train", alone, "pretrain", *short)
    assert done.returncode == 0, done.stderr
    final = f"checkpoints/step-{steps:08d}"
    assert checkpoint_bytes(job.run / final) == checkpoint_bytes(alone.parent / "runs/test/pretrain" / final)


def test_three_starts_without_progress_end_the_chain_and_say_why(
    slurm: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    recipe = write_chain(tmp_path, shards)
    # One rank is enough here: each takes seconds of processor time to start.
    job = Job(slurm, recipe, "pretrain.checkpoint.every_steps=260", "resources.nodes=1", "resources.ranks=1")
    for _ in range(3):
        log = job.run / "logs" / "rank-00000.log"
        slurm.wait_until(lambda: log.exists() and log.read_text().count("step 3/260") == job.starts)  # noqa: B023
        os.kill(job.rank("node1").pid, signal.SIGKILL)
        job.await_restart()
    assert slurm.wait_for(job.number, "FAILED")["ExitCode"] == "70:0"
    assert "failed with exit code 70, not requeued" in job.log.read_text()
    assert "3 starts in a row ended without a new checkpoint" in job.log.read_text()
    waiting = submitted(tmp_path / "runs")["finetune"].job
    assert slurm.wait_for(waiting, "CANCELLED")["Restarts"] == "0"
