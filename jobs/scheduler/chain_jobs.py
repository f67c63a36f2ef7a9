"""A recipe as Slurm jobs: first its shards, then every stage as a job that waits for the stage it starts from."""

import math
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.files.child_process import PROGRAM_FOLDER
from data.settings_diff import changed_settings
from data.text.printable import shell_word
from jobs.frozen_recipe import frozen_content, frozen_recipe, recipe_content
from jobs.scheduler import slurm
from jobs.scheduler.submissions import SHARDS, Submission, SubmissionFolder, dependencies
from pipeline.checkpoints.lost import check_final_checkpoint, is_left_behind
from pipeline.errors import ConfigError
from pipeline.recipe.sbatch_flags import excluded_nodes
from pipeline.recipe.schema import EvaluateStage, Recipe, Stage, TrainStage
from pipeline.recipe.sections import JobResources
from pipeline.runs.run_folder import run_folder

MERGE = f"{SHARDS} merge"
_CHANGES_SHOWN = 3
_SIGNAL_SLACK = 60  # seconds; Slurm may send a signal this much earlier than requested


@dataclass(frozen=True, slots=True)
class ChainJob:
    """One job of the chain: its name, what it waits for, and the command that submits it."""

    name: str
    waits_for: str | None
    """Name of an earlier job."""
    done: bool
    options: list[str]
    script: str
    arguments: list[str]
    variables: dict[str, str]
    """Environment variables for launch.sh."""

    def command(self, dependency: str | None) -> list[str]:
        """The command, as a list of words; `dependency` is the number of the job it waits for."""
        waiting = [f"--dependency=afterok:{dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
        return ["sbatch", "--parsable", *self.options, *waiting, self.script, *self.arguments]


@dataclass(frozen=True, slots=True)
class SubmitResult:
    """What was done about one job of the chain."""

    job: ChainJob
    action: Literal["done", "left alone", "submitted"]
    """`done` before, `left alone` because an earlier submission of it waits or runs, or `submitted`."""
    number: str | None
    remark: str = ""


def chain_jobs(
    recipe: Recipe,
    folder: SubmissionFolder,
    shards: tuple[Recipe, SubmissionFolder],
    extended: Collection[str] = (),
    without: Sequence[str] = (),
) -> list[ChainJob]:
    """The jobs of a recipe in order.

    Args:
        recipe: with its stages.
        folder: of its submissions.
        shards: the recipe, with its folder, whose jobs build the shards.
        extended: stages that are to go on with other settings than they may be done with.
        without: nodes on which no stage may run, in addition to those that the recipe excludes.

    Raises:
        ConfigError: a stage was done with other settings, or excludes nodes in a way that others cannot be added to.
    """
    chain = shard_jobs(*shards)
    frozen = frozen_recipe(recipe).path
    last_before_stages = chain[-1].name if chain else None
    for name, stage in recipe.stages.items():
        chain.append(
            ChainJob(
                name=name,
                waits_for=stage.start_stage or last_before_stages,
                done=name not in extended and _is_done(recipe, name),
                options=stage_options(recipe, name, folder, without),
                script=batch_script(stage),
                arguments=[str(frozen), name],
                variables=_variables(stage.resources),
            )
        )
    return chain


def shard_jobs(recipe: Recipe, folder: SubmissionFolder) -> list[ChainJob]:
    """The jobs that build the shards of a recipe: an array that reads and a job that merges, or one that does both."""
    shards = recipe.shards
    if shards is None:
        return []
    done = Path(shards.folder).exists()
    build = ["build", shards.source, shards.folder]
    for option, value in shards.build_options.items():
        flag = f"--{option.replace('_', '-')}"
        if isinstance(value, bool):
            build += [flag] if value else []
        elif value is not None:
            build.append(f"{flag}={value}")
    variables = _variables(shards.resources)

    def options(name: str, tasks: int) -> list[str]:
        log = folder.log(name).name.removesuffix(".log") + ("-%a.log" if tasks > 1 else ".log")
        size = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={shards.processes}"]
        size += [f"--array=1-{tasks}"] if tasks > 1 else []
        return [*_name_and_folder(recipe, name, folder, log), *size, *_job_options(shards.resources)]

    script = _script("shards")
    chain = [ChainJob(SHARDS, None, done, options(SHARDS, shards.parts), script, build, variables)]
    if shards.parts > 1:
        merge = ["merge", shards.folder, f"--processes={shards.processes}"]
        chain.append(ChainJob(MERGE, SHARDS, done, options(MERGE, 1), script, merge, variables))
    return chain


def stage_options(recipe: Recipe, name: str, folder: SubmissionFolder, without: Sequence[str] = ()) -> list[str]:
    """The options of sbatch for stage `name`, except those that make it wait; it is not to run on nodes `without`."""
    stage = recipe.stages[name]
    resources = stage.resources
    return [
        *_name_and_folder(recipe, name, folder, folder.log(name).name),
        f"--nodes={resources.nodes}",
        f"--ntasks-per-node={resources.ranks_per_node}",
        f"--cpus-per-task={resources.cpus_per_rank or stage.busy_threads}",
        f"--gpus-per-node={resources.ranks_per_node * resources.gpus_per_rank}",
        f"--signal=USR2@{_signal_seconds(stage)}",
        *_job_options(resources),
        *_exclusion(name, resources, without),
    ]


def batch_script(stage: Stage) -> str:
    """Path of the batch script of a stage."""
    if isinstance(stage, EvaluateStage):
        return _script("evaluate")
    return _script("finetune" if stage.start_from else "pretrain")


def submit_chain(
    chain: Sequence[ChainJob], recipe: Recipe, folder: SubmissionFolder, shards: SubmissionFolder
) -> list[SubmitResult]:
    """Submit every job that is neither done nor waiting or running from an earlier submission.

    A job that waits for one that has failed or been replaced, so that Slurm would cancel it, is submitted again.

    Raises:
        ConfigError: the checkpoint of a stage that is done no longer exists. Or Slurm refuses a job: those before it
            are submitted, and another call submits the rest.
        SchedulerDown: its controller does not answer.
    """
    if folder.path.name in recipe.stages:
        raise ConfigError(f"stage {folder.path.name}: job logs go to a folder of this name; rename the stage")
    for name in recipe.stages:
        check_final_checkpoint(recipe, name)
    results: list[SubmitResult] = []
    numbers: dict[str, str | None] = {}
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.freeze(recipe)
    frozen = frozen_recipe(recipe)
    frozen.write()
    for chain_job in chain:
        name = chain_job.name
        if chain_job.done:
            numbers[name] = None
            results.append(SubmitResult(chain_job, "done", None))
            continue
        record = shards if name in (SHARDS, MERGE) else folder
        before = record.newest().get(name)
        job = slurm.jobs([before.job])[before.job] if before else None
        dependency = numbers.get(chain_job.waits_for) if chain_job.waits_for else None
        command = chain_job.command(dependency)
        remark = ""
        if before and job and job.waits and (lost := _lost_dependency(before, dependency)):
            slurm.cancel([before.job])
            remark = f"job {before.job}, which {lost}, is cancelled"
        elif before and job and job.lives:
            numbers[name] = before.job
            difference = _difference(before, name, command, frozen.recipe)
            if difference is not None:
                settings = f"other settings ({difference})" if difference else "other settings"
                remark = f"{'waits' if job.waits else 'runs'} with {settings}; to submit it with these, cancel it first"
            results.append(SubmitResult(chain_job, "left alone", before.job, remark))
            continue
        number = slurm.submit(command, chain_job.variables)
        record.add(name, number, command)
        numbers[name] = number
        results.append(SubmitResult(chain_job, "submitted", number, remark))
    return results


def refuse_living_jobs(chain: Sequence[ChainJob], recipe: Recipe, folder: SubmissionFolder) -> None:
    """Refuse to go on with other settings in stages of which a job waits or runs: it has those it was submitted with.

    Raises:
        ConfigError: it names the job.
        SchedulerDown: Slurm does not answer.
    """
    newest, frozen = folder.newest(), frozen_recipe(recipe).recipe
    for chain_job in chain:
        before = newest.get(chain_job.name) if chain_job.name in recipe.stages and not chain_job.done else None
        job = slurm.jobs([before.job])[before.job] if before else None
        if before is None or job is None or not job.lives:
            continue
        if _difference(before, chain_job.name, chain_job.command(None), frozen) is not None:
            raise ConfigError(
                f"stage {chain_job.name}: --extend: job {before.job} {'waits' if job.waits else 'runs'} with the "
                "settings of before; cancel it first (coatnet cancel), then repeat the command"
            )


def _lost_dependency(before: Submission, dependency: str | None) -> str:
    """What a job waits for instead of `dependency`, the job that it would wait for if it was submitted now.

    Empty if it waits for that one, or for one that has not failed and whose stage is done by now.
    """
    recorded = next(iter(dependencies(before.command)), None)
    if recorded == dependency:
        return ""
    if recorded is None:
        return f"did not wait for job {dependency}"
    job = slurm.jobs([recorded])[recorded]
    if dependency is None and (job.lives or job.state in ("COMPLETED", "UNKNOWN")):
        return ""
    return f"waited for job {recorded} ({job.state})"


def as_script(chain: Sequence[ChainJob]) -> str:
    """The exact commands as a shell script: what `submit_chain` would run if no job was waiting or running."""
    lines = []
    variables: dict[str, str] = {}
    for job in chain:
        if job.done:
            lines.append(f"# {job.name}: done")
            continue
        variables[job.name] = f"job{len(variables) + 1}"
        words = [f"{name}={shell_word(value)}" for name, value in job.variables.items()]
        words += [shell_word(word) for word in job.command("JOB" if job.waits_for in variables else None)]
        line = " ".join(words).replace("afterok:JOB", f"afterok:${variables.get(job.waits_for or '')}")
        lines.append(f"{variables[job.name]}=$({line}) # {job.name}")
    return "\n".join(lines)


def _pattern(folder: Path, log: str) -> str:
    """Path of a log for sbatch, which replaces every `%...` in it, unless there is a backslash."""
    if "\\" in str(folder):
        return str(folder / log.replace("-%a", "")).replace("\\", "\\\\")
    return f"{str(folder).replace('%', '%%')}/{log}"


def _name_and_folder(recipe: Recipe, name: str, folder: SubmissionFolder, log: str) -> list[str]:
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


def _exclusion(name: str, job: JobResources, without: Sequence[str]) -> list[str]:
    """The option that excludes nodes in addition to those of a person's flags; of two such options the last counts."""
    if not without:
        return []
    own = excluded_nodes(job.flags)
    if "/" in own:
        raise ConfigError(
            f"stage {name}: resources.flags excludes the nodes in the file {own}, to which "
            f"{', '.join(without)} cannot be added; list the names themselves, or submit with --all-nodes"
        )
    return [f"--exclude={','.join([own, *without] if own else without)}"]


def _signal_seconds(stage: Stage) -> int:
    """How long before the time limit Slurm signals the ranks: time for a save, but at most a quarter of the limit."""
    grace = stage.checkpoint.grace_seconds if isinstance(stage, TrainStage) else 0.0
    wanted = grace + _SIGNAL_SLACK
    limit = stage.resources.time_limit_seconds
    return math.ceil(wanted if limit is None else max(1.0, min(wanted, limit / 4)))


def _variables(job: JobResources) -> dict[str, str]:
    if job.container is None:
        command = Path(sys.executable).with_name("coatnet")
        found = str(command) if command.exists() else shutil.which("coatnet")
        return {"COATNET": found} if found else {}
    return {
        "COATNET_CONTAINER": job.container,
        "COATNET_CONTAINER_RUNTIME": job.container_runtime,
        "COATNET_CONTAINER_MOUNTS": "\n".join(job.container_mounts),
    }


def _script(name: str) -> str:
    return str(PROGRAM_FOLDER / "slurm" / f"{name}.sbatch")


def _is_done(recipe: Recipe, name: str) -> bool:
    """Whether the stage has a result, of these settings, or had one whose folder is gone and that nothing needs."""
    folder = run_folder(recipe, name)
    if folder.result() is None:
        return is_left_behind(recipe, name)
    folder.check_settings(recipe)
    return True


def _difference(before: Submission, stage: str, command: Sequence[str], recipe: Recipe) -> str | None:
    """How a job that was submitted differs from `command`, which would submit it now; None if it does not.

    Settings of other stages are no difference. Empty if only the options of sbatch are known.
    """
    passing = "dependency|kill-on-invalid-dep"
    if stage in recipe.stages:
        passing += "|exclude"  # the program's own; those of a person are in the recipe, too
    old, new = (
        [word for word in words if not re.match(f"--({passing})=", word)] for words in (before.command, command)
    )
    if old == new:
        return None
    content = frozen_content(Path(old[-2])) if stage in recipe.stages and len(old) > 1 else None
    if content is None:
        return ""
    changes = changed_settings(_settings(content, stage), _settings(recipe_content(recipe), stage))
    if not changes and [*old[:-2], old[-1]] == [*new[:-2], new[-1]]:
        return None
    more = [f"and {len(changes) - _CHANGES_SHOWN} more"] if len(changes) > _CHANGES_SHOWN else []
    return "; ".join(changes[:_CHANGES_SHOWN] + more)


def _settings(recipe: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {"seed": recipe.get("seed"), **recipe.get("stages", {}).get(stage, {})}
