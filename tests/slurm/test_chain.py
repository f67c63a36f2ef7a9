"""Whole chains on a real cluster, with real ranks."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.scheduler.submissions import SubmissionFolder
from tests.servers.slurm import SlurmCluster
from tests.slurm.chains import submit, submitted, with_top_level, write_chain
from tests.support.command import coatnet
from tests.support.paths import ROOT
from tests.support.recipes import checkpoint_bytes, events, write_recipe

pytestmark = pytest.mark.slow(seconds=20)
STAGES = ("pretrain", "finetune", "evaluate")
SHORT = {"log": {"every_steps": 1, "samples": True}}


def results(runs: Path) -> dict[str, dict[str, object]]:
    """The results of the stages, without their speed."""
    found = {stage: json.loads((runs / "test" / stage / "result.json").read_text()) for stage in STAGES}
    return {stage: result | {"images_per_second": None} for stage, result in found.items()}


def samples(stage: Path) -> dict[str, str]:
    """The samples on which each rank was trained."""
    return {file.name: file.read_text() for file in sorted((stage / "samples").iterdir())}


def logs(folder: SubmissionFolder) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.path.glob("*.log")))


def test_one_command_builds_shards_pretrains_finetunes_and_evaluates_as_a_single_machine_does(
    slurm: SlurmCluster, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    building = {"source": str(pictures), "folder": "shards", "samples_per_shard": 7, "validation_per_class": 5}
    here, there = tmp_path / "here", tmp_path / 'it\'s a "folder"\nof 100%j = $HOME'
    for folder in (here, there):
        recipe = write_recipe(folder, folder / "shards", **SHORT)
        with_top_level(recipe, shards=building | {"parts": 2})
    recipe, runs = there / "recipe.yaml", there / "runs"
    # Two ranks on two nodes in the first stage, one in the others: each takes seconds of processor time to start.
    ranks = ["finetune.resources.ranks=1", "evaluate.resources.ranks=1"]
    overrides = ["pretrain.resources.nodes=2", "resources.gpus_per_rank=0", "resources.cpus_per_rank=1", *ranks]
    output = submit(recipe, *overrides)
    assert output.count("submitted") == 5
    jobs = submitted(runs)
    assert list(jobs) == ["shards", "shards merge", *STAGES]

    slurm.wait_for(jobs["pretrain"].job, "RUNNING")
    again = submit(recipe, *overrides)
    assert again.count("done") == 2  # the shards
    assert again.count("left alone") == 3
    assert submitted(runs) == jobs

    locally = coatnet("run", here / "recipe.yaml", *ranks)
    assert locally.returncode == 0, locally.stderr
    submissions = SubmissionFolder(runs / "test" / "slurm")
    slurm.wait_until(lambda: slurm.job(jobs["evaluate"].job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert {name: slurm.job(job.job)["JobState"] for name, job in jobs.items()} == dict.fromkeys(jobs, "COMPLETED"), (
        logs(submissions)
    )
    assert slurm.job(jobs["pretrain"].job)["NumNodes"] == "2"
    assert results(runs) == results(here / "runs")
    for stage in STAGES[:2]:
        one, other = here / "runs" / "test" / stage, runs / "test" / stage
        assert samples(one) == samples(other)
        last = sorted(path.name for path in (one / "checkpoints").iterdir())[-1]
        assert checkpoint_bytes(one / "checkpoints" / last) == checkpoint_bytes(other / "checkpoints" / last)
    # The log of a job has what a terminal would show, and nothing else.
    lines = submissions.log("pretrain").read_text().splitlines()
    assert lines[0].endswith("tasks")
    assert all(line.startswith("pretrain  ") for line in lines[1:-1]), lines
    assert lines[-1].endswith(f"job {jobs['pretrain'].job}: done")

    leaks = [file for file in runs.rglob("*") if file.is_file() and b"a-secret" in file.read_bytes()]
    assert leaks == []

    finished = submit(recipe, *overrides)
    assert finished.count("done") == 5
    assert submitted(runs) == jobs


def test_a_stage_that_cannot_start_cancels_its_dependents_and_submitting_again_submits_all(
    slurm: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    recipe, runs = write_chain(tmp_path, shards), tmp_path / "runs"
    short = ["pretrain.steps=2", "pretrain.optimizer.warmup_steps=1", "finetune.steps=2"]
    short += ["resources.nodes=1", "resources.ranks=1"]  # each rank takes seconds of processor time to start
    unreadable = runs / "test" / "pretrain" / "recipe.yaml"
    unreadable.parent.mkdir(parents=True)
    unreadable.write_text("seed: 1")
    submit(recipe, *short, "--no-doctor")
    jobs = submitted(runs)
    failed = slurm.wait_for(jobs["pretrain"].job, "FAILED")
    assert (failed["ExitCode"], failed["Restarts"]) == ("78:0", "0")
    log = SubmissionFolder(runs / "test" / "slurm").log("pretrain")
    assert (
        f"failed with exit code 78, not requeued: {runs}/test/pretrain/recipe.yaml: damaged (stage is missing)"
        in log.read_text()
    )
    for stage in STAGES[1:]:
        assert slurm.wait_for(jobs[stage].job, "CANCELLED")["Reason"] in ("DependencyNeverSatisfied", "Dependency")

    unreadable.unlink()
    assert submit(recipe, *short).count("submitted") == 3
    slurm.wait_for(submitted(runs)["evaluate"].job, "COMPLETED")
    assert (runs / "test" / "evaluate" / "result.json").exists()


def test_a_batch_script_submitted_by_hand_runs_on_more_nodes(slurm: SlurmCluster, shards: Path, tmp_path: Path) -> None:
    write_chain(tmp_path, shards)
    place = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", f"--chdir={tmp_path}"]
    script = ROOT / "slurm" / "pretrain.sbatch"
    job = slurm.run("sbatch", "--parsable", *place, str(script), "recipe.yaml", "pretrain", "pretrain.steps=5").strip()
    log = tmp_path / f"coatnet-pretrain-{job}.log"
    assert slurm.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log.read_text()
    begin = events(tmp_path / "runs" / "test" / "pretrain")[0]
    assert (begin["event"], begin["ranks"]) == ("begin", 2)


def test_a_waiting_job_runs_with_the_recipe_that_was_submitted(
    slurm: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    recipe, runs = write_chain(tmp_path, shards), tmp_path / "runs"
    short = ["pretrain.steps=2", "pretrain.optimizer.warmup_steps=1", "resources.flags=[--hold]"]
    short += ["resources.nodes=1", "resources.ranks=1"]
    submit(recipe, *short, "--no-doctor")
    jobs = submitted(runs)
    again = submit(recipe, *short, "pretrain.mixup_alpha=0.5", "--no-doctor")
    assert submitted(runs) == jobs
    assert "waits with other settings (mixup_alpha: 0.0 -> 0.5)" in " ".join(again.replace("\n", " ").split())
    assert again.count("waits with other settings") == 1  # those of another stage are none
    recipe.unlink()
    slurm.run("scontrol", "release", jobs["pretrain"].job)
    slurm.wait_for(jobs["pretrain"].job, "COMPLETED")
    assert yaml.safe_load((runs / "test" / "pretrain" / "recipe.yaml").read_text())["mixup_alpha"] == 0.0


def test_a_dry_run_prints_the_commands_that_submit_would_run(slurm: SlurmCluster, shards: Path, tmp_path: Path) -> None:
    recipe = with_top_level(
        write_chain(tmp_path / "it's\nexit 9", shards), shards={"source": "x", "folder": "y", "parts": 2}
    )
    printed = submit(recipe, "--dry-run", "--no-doctor", "resources.constraint=a&b", "resources.partition=low")
    assert not (tmp_path / "it's\nexit 9" / "runs").exists()
    assert slurm.run("squeue", "--noheader") == ""
    script = (
        printed.replace("--job-name=", "--hold --job-name=")
        .replace("--constraint='a&b'", "")
        .replace("'--constraint=a&b'", "")
    )
    (tmp_path / "it's\nexit 9" / "runs" / "test" / "slurm").mkdir(parents=True)
    subprocess.run(["bash", "-euc", script], check=True, env=None, capture_output=True)
    listed = slurm.run("squeue", "--noheader", "--sort=i", "--format=%j|%P|%E|%D").splitlines()
    numbers = [line.split("|") for line in listed]
    assert [name for name, *_ in numbers] == [
        "test.shards",
        "test.shards-merge",
        *(f"test.{stage}" for stage in STAGES),
    ]
    assert {partition for _, partition, *_ in numbers[2:]} == {"low"}
    assert all("afterok:" in waits for _, _, waits, _ in numbers[1:])
    assert [nodes for *_, nodes in numbers] == ["1", "1", "2", "2", "2"]


def test_a_sweep_is_a_run_for_each_value(slurm: SlurmCluster, shards: Path, tmp_path: Path) -> None:
    recipe = write_chain(tmp_path, shards)
    output = submit(recipe, "--sweep", "pretrain.optimizer.peak_learning_rate=1e-3,3e-3", "resources.flags=[--hold]")
    names = [f"test-peak_learning_rate-{rate}" for rate in ("1e-3", "3e-3")]
    for name, rate in zip(names, (1e-3, 3e-3), strict=True):
        assert name in output
        frozen = SubmissionFolder(tmp_path / "runs" / name / "slurm").recipe.read_text()
        assert f"peak_learning_rate: {rate}" in frozen
        assert list(submitted(tmp_path / "runs", name)) == list(STAGES)
    swept = json.loads((tmp_path / "runs" / "test.sweep.json").read_text())
    assert "coatnet logs -f " in output
    assert f"runs/{names[0]}\n" in output
    assert swept["runs"] == names
    assert swept["settings"][names[0]] == {"pretrain.optimizer.peak_learning_rate": "1e-3"}


def test_jobs_whose_dependency_is_lost_are_submitted_again(slurm: SlurmCluster, shards: Path, tmp_path: Path) -> None:
    recipe, runs = write_chain(tmp_path, shards), tmp_path / "runs"
    held = ["--no-doctor", "resources.flags=[--hold]"]  # Slurm does not yet cancel what is held
    submit(recipe, *held)
    first = submitted(runs)
    slurm.run("scancel", first["pretrain"].job)
    output = submit(recipe, *held)
    second = submitted(runs)
    assert output.count("submitted") == 3
    for stage, dependency in (("finetune", "pretrain"), ("evaluate", "finetune")):
        old, new = first[stage].job, second[stage].job
        waited = f"waited for job {first[dependency].job} (CANCELLED)"
        assert f"submitted: job {old}, which {waited}, is cancelled" in " ".join(output.split())
        assert slurm.job(old)["JobState"] == "CANCELLED"
        assert f"afterok:{second[dependency].job}(" in slurm.job(new)["Dependency"]
    assert submit(recipe, *held).count("left alone") == 3
    assert submitted(runs) == second
