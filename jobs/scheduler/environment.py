"""Slurm's variables in the environment of a command.

Those of a job must not change the jobs that are submitted from it, and they remain in shells that outlive it.
"""

from collections.abc import Mapping, Sequence

from jobs.rank_variables import rank_variables
from pipeline.preflight.finding import Finding, Findings

_OF_THE_SITE = frozenset(
    {
        "SLURM_BITSTR_LEN", "SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_DEBUG_FLAGS", "SLURM_HOME",
        "SLURM_JWT", "SLURM_ROOT", "SLURM_TIME_FORMAT",
    }
)  # fmt: skip
"""Where Slurm is and how its commands print, and how to log in to it."""
_WHERE_TO_RUN = {
    "SBATCH_ACCOUNT": "resources.account",
    "SBATCH_CONSTRAINT": "resources.constraint",
    "SBATCH_PARTITION": "resources.partition",
    "SBATCH_QOS": "resources.qos",
    "SBATCH_RESERVATION": "--reservation in resources.flags",
    "SBATCH_WCKEY": "--wckey in resources.flags",
}
"""Defaults that users have in their profiles, and what precedes them."""
_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_")
_OF_QUERIES = ("SACCT_", "SCANCEL_", "SCONTROL_", "SINFO_", "SQUEUE_")
"""Prefixes of options for people who look at the queue: formats, and filters that hide jobs."""
_OPTIONS = (
    "CPU_BIND",
    "CPUS_PER",
    "DISTRIBUTION",
    "EXCLUSIVE",
    "EXPORT",
    "GPU",
    "HINT",
    "MEM",
    "NTASKS",
    "NNODES",
    "TRES",
)
"""In the names of variables with which srun changes how it starts tasks."""


def scheduler_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands, which is also that of the jobs they submit."""
    dropped = {*job_variables(environment), *_sbatch_options(environment), *rank_variables(environment)}
    return {
        name: value for name, value in environment.items() if name not in dropped and not name.startswith(_OF_QUERIES)
    }


def job_variables(environment: Mapping[str, str]) -> list[str]:
    """The names of variables that describe the job or step in which this environment was made."""
    return sorted(name for name in environment if name.startswith(_OF_JOBS) and name not in _OF_THE_SITE)


def dropped_variables(environment: Mapping[str, str]) -> list[str]:
    """The names of all variables that submitted jobs do not get."""
    return sorted(environment.keys() - scheduler_environment(environment).keys())


def submission_findings(environment: Mapping[str, str]) -> list[Finding]:
    """What a user must know about these variables when jobs are submitted; `ok` for those that have an effect."""
    found = Findings("")
    if names := job_variables(environment):
        job = environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID")
        of_job = f"of Slurm job {job}" if job else "of a Slurm job"
        found.warning(f"environment: variables {of_job} are not passed on to the jobs: {_listed(names)}", "")
    if names := _sbatch_options(environment):
        found.warning(f"environment: no effect of {', '.join(names)}", "set resources in the recipe")
    if names := rank_variables(environment):
        found.warning(f"environment: variables of a rank are not passed on to the jobs: {', '.join(names)}", "")
    for name, setting in _WHERE_TO_RUN.items():
        if value := environment.get(name):
            found.ok(f"environment: {name}={value} holds for jobs without {setting} in the recipe")
    return found


def _sbatch_options(environment: Mapping[str, str]) -> list[str]:
    return sorted(name for name in environment if name.startswith("SBATCH_") and name not in _WHERE_TO_RUN)


def _listed(names: Sequence[str]) -> str:
    """The names that matter most, and the number of the others."""
    named = [name for name in names if any(option in name for option in _OPTIONS)] or list(names[:1])
    more = len(names) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
