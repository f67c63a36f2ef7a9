"""Whether Slurm would take the jobs of a recipe, and what else it has to do with them."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import MERGE, chain_steps
from jobs.scheduler.submissions import SHARDS, submission_folder
from pipeline.errors import ConfigError
from pipeline.preflight.disk_space import clock_finding
from pipeline.preflight.finding import Finding
from pipeline.recipe.schema import Recipe

_FIXES = {
    "artition": "set resources.partition; there are: {partitions}",
    "feature": "correct resources.constraint",
    "ccount": "set resources.account, and resources.qos where the site asks for it",
    "qos": "set resources.qos",
    "QOS": "set resources.qos",
    "ime limit": "shorten resources.time_limit, or take another partition; their limits: {limits}",
    "memory": "lower resources.memory_gigabytes; {nodes}",
    "unrecognized option": "correct resources.flags",
    "node count": "lower resources.nodes; {nodes}",
    "node configuration": "ask for less (resources.nodes, ranks, cpus_per_rank, memory_gigabytes) or set "
    "resources.partition; {nodes}",
}
"""Part of what Slurm says -> what to do, the first that fits."""


def dry_run(recipe: Recipe, stages: Sequence[str]) -> Iterator[Finding]:
    """Have Slurm try the jobs of these stages that are to come, without submitting any."""
    if not slurm.available():
        yield Finding("error", "", "no Slurm on this machine", "go to one that has its commands, or put them on PATH")
        return
    folder = submission_folder(recipe)
    try:
        for step in chain_steps(recipe, folder, (recipe, folder)):
            where = SHARDS if step.name in (SHARDS, MERGE) else step.name
            if step.done or where not in (SHARDS, *stages):
                continue
            try:
                said = slurm.try_out(step.command(None), step.variables)
                yield Finding("ok", where, re.sub(r"^Job \d+ to ", "Slurm takes the job: it would ", said))
            except ConfigError as error:
                yield _refused(where, _plain(str(error)))
        with suppress(ConfigError):  # a site may keep these to itself
            yield clock_finding("Slurm's controller", abs(slurm.clock() - time.time()))
        with suppress(ConfigError):
            yield Finding("ok", "", f"version: {slurm.call('sinfo', '--version').strip()}")
    except slurm.SchedulerDown as error:
        yield Finding("error", "", f"Slurm does not answer: {error}", "try again later, or ask those who run it")


def _refused(where: str, said: str) -> Finding:
    what, fix = f"Slurm refuses the job: {said}", _fix(said)
    if "node configuration" in said:
        down = slurm.call("sinfo", "--noheader", "--states=down,drain,fail", "--format=%n").split()
        if down:
            # Tried, such a job is refused; submitted, it waits for them.
            what = f"{what}, since nodes are down or drained: {len(set(down))}"
            return Finding("warning", where, what, f"it may wait for them; or {fix}")
    return Finding("error", where, what, fix)


def _plain(said: str) -> str:
    """Why Slurm refuses a job, without who says so; where it says it twice, the first is the more telling."""
    reasons = said.removeprefix("sbatch: ").split("allocation failure: ")
    return next(reason for reason in reasons if reason).replace("sbatch: ", "").removeprefix("error: ").strip()


def _fix(said: str) -> str:
    for sign, fix in _FIXES.items():
        if sign in said:
            return fix.format(
                partitions=", ".join(sorted(set(slurm.call("sinfo", "--noheader", "--format=%R").split()))),
                limits=", ".join(slurm.call("sinfo", "--noheader", "--format=%R %l").splitlines()),
                nodes=f"there are: {_nodes()}",
            )
    return "correct resources as Slurm says"


def _nodes() -> str:
    lines = slurm.call("sinfo", "--noheader", "--format=%R|%D|%c|%m|%G").splitlines()
    found = []
    for line in lines:
        partition, count, cpus, megabytes, gpus = line.split("|", 4)
        with_gpus = "" if gpus == "(null)" else f", {gpus}"
        found.append(
            f"{partition} {count} x ({cpus} processors, {int(megabytes.rstrip('+')) / 1024:.0f} GiB{with_gpus})"
        )
    return ", ".join(found)
