"""A chain as Slurm jobs: shards, then every stage as a job that waits for the one it starts from."""

import math
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs
from jobs.scheduler import slurm
from jobs.scheduler.submissions import SHARDS, SubmissionFolder
from pipeline.errors import ConfigError
from pipeline.recipe.schema import EvaluateStage, Recipe, Stage, TrainStage
from pipeline.recipe.sections import JobResources
from pipeline.run_folder import run_folder

MERGE = f"{SHARDS} merge"
_SIGNAL_SLACK = 60  # seconds; Slurm may send a signal so much earlier than it is asked to


@dataclass(frozen=True, slots=True)
class ChainJob:
    """One job of the chain: what it is called, what it waits for, and the command that submits it."""

    name: str
    waits_for: str | None
    """Name of an earlier step."""
    done: bool
    options: list[str]
    script: str
    arguments: list[str]
    variables: dict[str, str]
    """For launch.sh."""

    def command(self, dependency: str | None) -> list[str]:
        """The words of the command; `dependency` is the number of the job it waits for."""
        waiting = [f"--dependency=afterok:{dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
        return ["sbatch", "--parsable", *self.options, *waiting, self.script, *self.arguments]


@dataclass(frozen=True, slots=True)
class Submitted:
    """What came of a step: `done` before, `left alone` since its job lives, or `submitted`."""

    step: ChainJob
    what: str
    job: str | None
    remark: str = ""


def chain_steps(recipe: Recipe, folder: SubmissionFolder, shards: tuple[Recipe, SubmissionFolder]) -> list[ChainJob]:
    """The jobs of a recipe in order; `shards` is the recipe, with its folder, whose jobs build the shards."""
    steps = shard_steps(*shards)
    before_all = steps[-1].name if steps else None
    for name, stage in recipe.stages.items():
        steps.append(
            ChainJob(
                name=name,
                waits_for=stage.start_from or before_all,
                done=run_folder(recipe, name).result() is not None,
                options=stage_options(recipe, name, folder),
                script=template(stage),
                arguments=[str(folder.recipe), name],
                variables=_variables(stage.resources),
            )
        )
    return steps


def shard_steps(recipe: Recipe, folder: SubmissionFolder) -> list[ChainJob]:
    """The jobs that build the shards of a recipe: an array that reads and a job that merges, or one for both."""
    shards = recipe.shards
    if shards is None:
        return []
    done = Path(shards.folder).exists()
    build = ["build", shards.source, shards.folder]
    for option, value in shards.build_options.items():
        words = option.replace("_", "-")
        if isinstance(value, bool):
            build += [f"--{words}"] if value else []
        elif value is not None:
            build.append(f"--{words}={value}")
    variables = _variables(shards.resources)

    def options(name: str, tasks: int) -> list[str]:
        log = folder.log(name).name.removesuffix(".log") + ("-%a.log" if tasks > 1 else ".log")
        asked = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={shards.processes}"]
        asked += [f"--array=1-{tasks}"] if tasks > 1 else []
        return [*_place(recipe, name, folder, log), *asked, *_job_options(shards.resources)]

    script = _template("shards")
    steps = [ChainJob(SHARDS, None, done, options(SHARDS, shards.parts), script, build, variables)]
    if shards.parts > 1:
        merge = ["merge", shards.folder, f"--processes={shards.processes}"]
        steps.append(ChainJob(MERGE, SHARDS, done, options(MERGE, 1), script, merge, variables))
    return steps


def stage_options(recipe: Recipe, name: str, folder: SubmissionFolder) -> list[str]:
    """The options of sbatch for stage `name`, but for what it waits for."""
    stage = recipe.stages[name]
    asked = stage.resources
    return [
        *_place(recipe, name, folder, folder.log(name).name),
        f"--nodes={asked.nodes}",
        f"--ntasks-per-node={asked.ranks_per_node}",
        f"--cpus-per-task={asked.cpus_per_rank or stage.busy_threads}",
        f"--gpus-per-node={asked.ranks_per_node * asked.gpus_per_rank}",
        f"--signal=USR2@{_seconds_before_the_end(stage)}",
        *_job_options(asked),
    ]


def template(stage: Stage) -> str:
    """Path of the batch script of a stage."""
    if isinstance(stage, EvaluateStage):
        return _template("evaluate")
    return _template("finetune" if stage.start_from else "pretrain")


def submit_chain(
    steps: Sequence[ChainJob], recipe: Recipe, folder: SubmissionFolder, shards: SubmissionFolder
) -> list[Submitted]:
    """Submit every step that is neither done nor has a job that lives.

    Raises:
        ConfigError: Slurm refuses a job; those before it are submitted, and calling again goes on from there.
        SchedulerDown: its controller does not answer.
    """
    if folder.path.name in recipe.stages:
        raise ConfigError(f"stage {folder.path.name}: this is the folder for logs of jobs; give the stage another name")
    came: list[Submitted] = []
    numbers: dict[str, str | None] = {}
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.freeze(recipe)
    for step in steps:
        record = shards if step.name in (SHARDS, MERGE) else folder
        before = record.newest().get(step.name)
        if step.done:
            numbers[step.name] = None
            came.append(Submitted(step, "done", None))
            continue
        job = slurm.jobs([before.job])[before.job] if before else None
        dependency = numbers.get(step.waits_for) if step.waits_for else None
        command = step.command(dependency)
        if before and job and job.lives:
            numbers[step.name] = before.job
            remark = ""
            if job.waits and _without_dependency(before.command) != _without_dependency(command):
                remark = "with other settings than now; cancel it first to submit it with these"
            came.append(Submitted(step, "left alone", before.job, remark))
            continue
        number = slurm.submit(command, step.variables)
        record.add(step.name, number, command)
        numbers[step.name] = number
        came.append(Submitted(step, "submitted", number))
    return came


def script_of(steps: Sequence[ChainJob]) -> str:
    """The exact commands as a shell script: what `submit_chain` would do, if no job lives."""
    lines = []
    names: dict[str, str] = {}
    for step in steps:
        if step.done:
            lines.append(f"# {step.name}: done")
            continue
        names[step.name] = f"job{len(names) + 1}"
        words = [f"{name}={shlex.quote(value)}" for name, value in step.variables.items()]
        words += [shlex.quote(word) for word in step.command("JOB" if step.waits_for in names else None)]
        line = " ".join(words).replace("afterok:JOB", f"afterok:${names.get(step.waits_for or '')}")
        lines.append(f"{names[step.name]}=$({line}) # {step.name}")
    return "\n".join(lines)


def _pattern(folder: Path, log: str) -> str:
    """Path of a log as sbatch takes it, which replaces `%...` in all of it; after a backslash, nothing is replaced."""
    if "\\" in str(folder):
        return str(folder / log.replace("-%a", "")).replace("\\", "\\\\")
    return f"{str(folder).replace('%', '%%')}/{log}"


def _place(recipe: Recipe, name: str, folder: SubmissionFolder, log: str) -> list[str]:
    return [
        f"--job-name={recipe.name}.{name.replace(' ', '-')}",
        f"--chdir={folder.path}",
        f"--output={_pattern(folder.path, log)}",
        "--export=ALL",
    ]


def _job_options(job: JobResources) -> list[str]:
    options = [f"--time={job.time_limit}"] if job.time_limit else []
    options += [f"--mem={job.memory_gigabytes}G"] if job.memory_gigabytes else []
    for option in ("partition", "account", "qos", "constraint"):
        value = getattr(job, option)
        options += [f"--{option}={value}"] if value else []
    return [*options, *job.flags]


def _seconds_before_the_end(stage: Stage) -> int:
    """When ranks are told that the limit comes near: time for a save, but never most of the time that there is."""
    grace = stage.checkpoint.grace_seconds if isinstance(stage, TrainStage) else 0.0
    wanted = grace + _SIGNAL_SLACK
    limit = stage.resources.time_limit_seconds
    return math.ceil(wanted if limit is None else max(1.0, min(wanted, limit / 4)))


def _variables(job: JobResources) -> dict[str, str]:
    if job.container is None:
        beside = Path(sys.executable).with_name("coatnet")
        found = str(beside) if beside.exists() else shutil.which("coatnet")
        return {"COATNET": found} if found else {}
    return {
        "COATNET_CONTAINER": job.container,
        "COATNET_CONTAINER_RUNTIME": job.container_runtime,
        "COATNET_CONTAINER_MOUNTS": "\n".join(job.container_mounts),
    }


def _template(name: str) -> str:
    # Beside the packages, in a checkout and where they are installed.
    return str(Path(str(jobs.__file__)).resolve().parents[1] / "slurm" / f"{name}.sbatch")


def _without_dependency(command: Sequence[str]) -> list[str]:
    return [word for word in command if not re.match(r"--(dependency|kill-on-invalid-dep)=", word)]
