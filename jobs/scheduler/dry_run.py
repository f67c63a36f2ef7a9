"""Whether Slurm would accept the jobs of a recipe."""

import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import MERGE, chain_jobs
from jobs.scheduler.submissions import SHARDS, submission_folder
from pipeline.errors import ConfigError
from pipeline.preflight.disk_space import clock_finding
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.recipe.schema import Recipe

_FIXES = {
    "artition": "set resources.partition; there are: {partitions}",
    "feature": "correct resources.constraint",
    "ccount": "set resources.account, and resources.qos if the site requires it",
    "qos": "set resources.qos",
    "QOS": "set resources.qos",
    "ime limit": "shorten resources.time_limit, or use another partition; their limits: {limits}",
    "memory": "lower resources.memory_gigabytes; {nodes}",
    "unrecognized option": "correct resources.flags",
    "node count": "lower resources.nodes; {nodes}",
    "node configuration": "request less (resources.nodes, ranks, cpus_per_rank, memory_gigabytes) or set "
    "resources.partition; {nodes}",
}
"""Part of Slurm's message -> the fix; the first match counts."""
NO_SLURM = Finding(
    "error", "", "Slurm is not on this machine", "use a machine that has its commands, or put them on PATH"
)


def dry_run(
    recipe: Recipe, stages: Sequence[str], extended: Collection[str] = (), without: Sequence[str] = ()
) -> Iterator[Finding]:
    """Let Slurm check the jobs of these stages that are not done, without submitting any.

    Those in `extended` are done with other settings, and are to go on with these. None is to run on nodes `without`.
    """
    if not slurm.has_commands():
        yield NO_SLURM
        return
    folder = submission_folder(recipe)
    try:
        for job in chain_jobs(recipe, folder, (recipe, folder), extended, without):
            where = SHARDS if job.name in (SHARDS, MERGE) else job.name
            if job.done or where not in (SHARDS, *stages):
                continue
            try:
                answer = slurm.try_out(job.command(None), job.variables)
                yield Finding("ok", where, re.sub(r"^Job \d+ to ", "Slurm accepts the job: it would ", answer))
            except slurm.NotConfigured:
                raise
            except ConfigError as error:
                refused = _refused(where, _plain(str(error)))
                if without:
                    more = f"it is without {', '.join(without)}, which `coatnet submit --all-nodes` takes"
                    refused = replace(refused, fix=f"{refused.fix}; {more}")
                yield refused
        with suppress(ConfigError):  # a site may hide these
            yield clock_finding("Slurm's controller", abs(slurm.clock() - time.time()))
        with suppress(ConfigError):
            yield Finding("ok", "", f"version: {slurm.call('sinfo', '--version').strip()}")
    except slurm.NotConfigured as error:
        yield finding_of_error("", error)
    except slurm.SchedulerDown as error:
        yield Finding("error", "", f"Slurm does not answer: {error}", "try again later, or ask its administrators")


def _refused(where: str, reason: str) -> Finding:
    what, fix = f"Slurm refuses the job: {reason}", _fix(reason)
    if "node configuration" in reason:
        down = slurm.call("sinfo", "--noheader", "--states=down,drain,fail", "--format=%n").split()
        if down:
            # --test-only refuses such a job; submitted, it waits for the nodes.
            what = f"{what}; {len(set(down))} nodes are down or drained"
            return Finding("warning", where, what, f"the job may wait for them; or {fix}")
    return Finding("error", where, what, fix)


def _plain(message: str) -> str:
    """Slurm's reason for refusing a job, without prefixes; of two reasons, the first is more specific."""
    reasons = message.removeprefix("sbatch: ").split("allocation failure: ")
    return next(reason for reason in reasons if reason).replace("sbatch: ", "").removeprefix("error: ").strip()


def _fix(reason: str) -> str:
    for sign, fix in _FIXES.items():
        if sign in reason:
            return fix.format(
                partitions=", ".join(sorted(set(slurm.call("sinfo", "--noheader", "--format=%R").split()))),
                limits=", ".join(slurm.call("sinfo", "--noheader", "--format=%R %l").splitlines()),
                nodes=f"there are: {_nodes()}",
            )
    return "correct the stage's resources accordingly"


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
