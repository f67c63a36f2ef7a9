"""The commands of `coatnet submit`: options, variables and names; without Slurm."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.bundled_recipes import bundled_recipes
from jobs.frozen_recipe import frozen_recipe
from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import as_script, batch_script, chain_jobs, submit_chain
from jobs.scheduler.slurm import SlurmJob
from jobs.scheduler.submissions import SubmissionFolder, submission_folder
from jobs.sweep import variations
from pipeline.errors import ConfigError
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.runs.run_folder import run_folder
from tests.support.command import coatnet
from tests.support.recipes import write_recipe
from tests.support.records import stage_result


def commands_of(recipe: Recipe) -> dict[str, list[str]]:
    """The command of each job, with names in place of the numbers of jobs it waits for."""
    folder = submission_folder(recipe)
    return {job.name: job.command(job.waits_for) for job in chain_jobs(recipe, folder, (recipe, folder))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tmp_path / "shards")


def test_nothing_is_submitted_for_a_stage_whose_checkpoint_is_gone(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.freeze(plan_stage(recipe, "pretrain"), None)
    folder.finish(stage_result("pretrain/checkpoints/step-00000040"))
    submissions = submission_folder(recipe)
    chain = chain_jobs(recipe, submissions, (recipe, submissions))
    with pytest.raises(ConfigError, match="stage pretrain: done, but its checkpoint .* no longer exists"):
        submit_chain(chain, recipe, submissions, submissions)
    assert not submissions.submissions()


@pytest.mark.parametrize(
    ("waits_for", "state", "remark"),
    [
        ("7", "PENDING", ""),
        ("5", "FAILED", "job 8, which waited for job 5 (FAILED), is cancelled"),
        (None, "", "job 8, which did not wait for job 7, is cancelled"),
    ],
)
def test_a_job_that_waits_for_another_one_than_the_newest_is_submitted_again(
    waits_for: str | None, state: str, remark: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(path)
    submissions = submission_folder(recipe)
    submissions.path.mkdir(parents=True)
    pretrain, finetune, _ = chain_jobs(recipe, submissions, (recipe, submissions))
    submissions.add("pretrain", "7", pretrain.command(None))
    submissions.add("finetune", "8", finetune.command(waits_for))
    cancelled: list[str] = []
    states = {"7": "RUNNING", "8": "PENDING", "5": state}
    monkeypatch.setattr(slurm, "jobs", lambda numbers: {number: SlurmJob(number, states[number]) for number in numbers})
    monkeypatch.setattr(slurm, "submit", lambda command, variables: "9")
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)
    results = submit_chain([pretrain, finetune], recipe, submissions, submissions)
    assert [(result.action, result.number) for result in results] == [
        ("left alone", "7"),
        ("submitted", "9") if remark else ("left alone", "8"),
    ]
    assert results[1].remark == remark
    assert cancelled == (["8"] if remark else [])


@pytest.mark.parametrize(("state", "is_lost"), [("COMPLETED", False), ("UNKNOWN", False), ("FAILED", True)])
def test_a_job_is_left_alone_if_the_one_it_waited_for_has_succeeded(
    state: str, is_lost: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(path)
    submissions = submission_folder(recipe)
    submissions.path.mkdir(parents=True)
    pretrain, finetune, _ = chain_jobs(recipe, submissions, (recipe, submissions))
    submissions.add("finetune", "8", finetune.command("5"))
    states = {"8": "PENDING", "5": state}
    monkeypatch.setattr(slurm, "jobs", lambda numbers: {number: SlurmJob(number, states[number]) for number in numbers})
    monkeypatch.setattr(slurm, "submit", lambda command, variables: "9")
    monkeypatch.setattr(slurm, "cancel", lambda numbers: None)
    results = submit_chain([replace(pretrain, done=True), finetune], recipe, submissions, submissions)
    assert results[1].action == ("submitted" if is_lost else "left alone")


def test_resources_become_options_of_sbatch(path: Path) -> None:
    settings = [
        "nodes=2", "ranks=8", "cpus_per_rank=6", "memory_gigabytes=400", "time_limit=1-00:00:00", "partition=gpu",
        "account=ml", "qos=long", "constraint=a100&ib", "flags=[--exclusive, --exclude=node17]",
    ]  # fmt: skip
    recipe = load_recipe(path, [f"pretrain.resources.{setting}" for setting in settings])
    folder = path.parent / "runs" / "test" / "slurm"
    assert commands_of(recipe)["pretrain"] == [
        "sbatch", "--parsable", "--job-name=test.pretrain", f"--chdir={folder}", f"--output={folder}/pretrain.log",
        "--export=ALL", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=6", "--gpus-per-node=4", "--signal=USR2@180",
        "--time=1-00:00:00", "--mem=400G", "--partition=gpu", "--account=ml", "--qos=long", "--constraint=a100&ib",
        "--exclusive", "--exclude=node17", batch_script(recipe.stages["pretrain"]), str(frozen_recipe(recipe).path), "pretrain",
    ]  # fmt: skip


def test_the_ranks_of_a_paper_recipe_fit_on_nodes_of_eight_gpus_and_96_processors() -> None:
    command = commands_of(load_recipe(bundled_recipes()["coatnet-7-in21k"]))["pretrain"]
    assert {"--nodes=16", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"} <= set(command)


def test_unset_resources_are_left_to_the_site_and_the_batch_script(path: Path) -> None:
    command = commands_of(
        load_recipe(path, ["data.workers=5", "resources.threads_per_rank=2", "resources.gpus_per_rank=0"])
    )
    for option in ("--time", "--mem", "--partition", "--account", "--qos", "--constraint"):
        assert not any(word.startswith(f"{option}=") for word in command["finetune"])
    assert "--cpus-per-task=7" in command["finetune"]
    assert "--gpus-per-node=0" in command["finetune"]
    assert "--dependency=afterok:pretrain" in command["finetune"]
    assert "--kill-on-invalid-dep=yes" in command["finetune"]
    names = {name: Path(next(word for word in words if word.endswith(".sbatch"))) for name, words in command.items()}
    assert {name: found.stem for name, found in names.items()} == {name: name for name in command}
    assert all(found.is_file() for found in names.values())


@pytest.mark.parametrize(
    ("limit", "grace", "seconds"),
    [(None, 120, 180), ("1-00:00:00", 600, 660), ("0:10:00", 120, 150), ("0:00:02", 120, 1)],
)
def test_ranks_are_signalled_early_enough_for_a_save_but_not_at_once(
    path: Path, limit: str | None, grace: int, seconds: int
) -> None:
    settings = [f"pretrain.checkpoint.grace_seconds={grace}"]
    settings += [f"pretrain.resources.time_limit={limit}"] if limit else []
    assert f"--signal=USR2@{seconds}" in commands_of(load_recipe(path, settings))["pretrain"]


def test_the_container_settings_reach_the_batch_script(path: Path) -> None:
    settings = ["container=an image.sif", "container_runtime=apptainer", "container_mounts=[/data, /scratch:/tmp]"]
    recipe = load_recipe(path, [f"resources.{setting}" for setting in settings])
    folder = submission_folder(recipe)
    for job in chain_jobs(recipe, folder, (recipe, folder)):
        assert job.variables == {
            "COATNET_CONTAINER": "an image.sif",
            "COATNET_CONTAINER_RUNTIME": "apptainer",
            "COATNET_CONTAINER_MOUNTS": "/data\n/scratch:/tmp",
        }


def test_the_options_of_shards_reach_the_command_that_builds_them(path: Path) -> None:
    settings = [
        "source=images", "folder=new", "seed=3", "samples_per_shard=10", "validation_per_class=2", "short_side=256",
        "convert=true", "quality=90", "subsampling=4:2:0", "recompress=true", "restart_markers=true", "processes=4", "parts=3", "resources.partition=cpu", "resources.time_limit=0:30:00",
    ]  # fmt: skip
    recipe = load_recipe(path, [f"shards.{setting}" for setting in settings])
    commands = commands_of(recipe)
    assert list(commands) == ["shards", "shards merge", "pretrain", "finetune", "evaluate"]
    build, merge = commands["shards"], commands["shards merge"]
    assert build[build.index("build") :] == [
        "build", f"{path.parent}/images", f"{path.parent}/new", "--seed=3", "--samples-per-shard=10",
        "--validation-per-class=2", "--short-side=256", "--convert", "--quality=90", "--subsampling=4:2:0",
        "--recompress", "--restart-markers", "--processes=4",
    ]  # fmt: skip
    assert merge[merge.index("merge") :] == ["merge", f"{path.parent}/new", "--processes=4"]
    for command in (build, merge):
        assert {"--partition=cpu", "--time=0:30:00", "--cpus-per-task=4", "--nodes=1"} <= set(command)
    assert "--array=1-3" in build
    assert "--dependency=afterok:shards merge" in commands["pretrain"]
    alone = commands_of(load_recipe(path, ["shards.source=images", "shards.folder=new"]))
    assert list(alone) == ["shards", "pretrain", "finetune", "evaluate"]
    build = alone["shards"]
    assert build[build.index("build") :] == [
        "build", f"{path.parent}/images", f"{path.parent}/new", "--seed=0", "--samples-per-shard=4096",
        "--validation-per-class=0", "--processes=1",
    ]  # fmt: skip
    (path.parent / "new").mkdir()
    assert as_script(chain_jobs(recipe, submission_folder(recipe), (recipe, submission_folder(recipe)))).startswith(
        "# shards: done\n# shards merge: done\njob1=$("
    )


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [("100%j", "100%%j"), ("back\\slash", "back\\\\slash"), ("both%j\\x", "both%j\\\\x"), ("a b\n'c\"", "a b\n'c\"")],
)
def test_percent_signs_in_log_paths_are_escaped(tmp_path: Path, folder: str, pattern: str) -> None:
    path = write_recipe(tmp_path / folder, tmp_path / "shards")
    command = commands_of(load_recipe(path))["pretrain"]
    assert f"--output={tmp_path}/{pattern}/runs/test/slurm/pretrain.log" in command


def test_a_stage_cannot_have_the_name_of_the_job_folder(path: Path) -> None:
    path.write_text(path.read_text().replace("finetune", "slurm"))
    refused = coatnet("submit", path, "--no-doctor")
    assert refused.returncode == 78
    assert "stage slurm: job logs go to a folder of this name; rename the stage" in refused.stderr


def test_submitting_without_slurm_is_refused(path: Path) -> None:
    refused = coatnet("submit", path, "--no-doctor", PATH="/nowhere")
    assert refused.returncode == 78
    assert "sbatch: command not found; use a machine that has Slurm's commands, or put them on PATH" in refused.stderr


def test_a_truncated_record_loses_only_one_line(tmp_path: Path) -> None:
    folder = SubmissionFolder(tmp_path)
    folder.add("pretrain", "7", ["sbatch"])
    with open(tmp_path / "submissions.jsonl", "a") as record:
        record.write('{"stage": "fine\n')
    folder.add("pretrain", "9", ["sbatch"])
    assert {stage: submission.job for stage, submission in folder.newest().items()} == {"pretrain": "9"}


def test_a_sweep_is_all_combinations_with_distinct_names() -> None:
    found = variations("own", ["optimizer.peak_learning_rate=5e-4,1e-3", "data.crop_area=[0.1,1.0],[0.2,1.0]"])
    assert [(one.name, one.overrides[1:]) for one in found] == [
        ("own-peak_learning_rate-5e-4-crop_area-_0.1_1.0_", ["optimizer.peak_learning_rate=5e-4", "data.crop_area=[0.1,1.0]"]),
        ("own-peak_learning_rate-5e-4-crop_area-_0.2_1.0_", ["optimizer.peak_learning_rate=5e-4", "data.crop_area=[0.2,1.0]"]),
        ("own-peak_learning_rate-1e-3-crop_area-_0.1_1.0_", ["optimizer.peak_learning_rate=1e-3", "data.crop_area=[0.1,1.0]"]),
        ("own-peak_learning_rate-1e-3-crop_area-_0.2_1.0_", ["optimizer.peak_learning_rate=1e-3", "data.crop_area=[0.2,1.0]"]),
    ]  # fmt: skip
    assert [one.name for one in variations("own", ["data.train=a/b,a:b"])] == ["own-train-a_b", "own-train-a_b-1"]


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["seed"], "--sweep seed: write it key=value,value, such as optimizer.peak_learning_rate=5e-4,1e-3"),
        (["seed=1,,2"], "--sweep seed=1,,2: write it key=value,value"),
        (["seed=1,1"], "--sweep seed=1,1: a value is given twice"),
        (["shards.seed=1,2"], "--sweep shards.seed=1,2: shards are built once for all runs"),
        (["seed=1,2", "seed=3"], "--sweep: a key is given twice; give it once, with all values"),
    ],
)
def test_a_malformed_sweep_is_refused(sweeps: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        variations("own", sweeps)
    assert str(refused.value).startswith(message)
