"""Which variables of the environment reach Slurm's commands, and what is said about the others."""

from jobs.scheduler.environment import dropped_variables, scheduler_environment, submission_findings

SITE = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "one", "SLURM_TIME_FORMAT": "%s"}
OF_A_JOB = {"SLURM_JOB_ID": "55", "SLURM_CPU_BIND": "mask_cpu:0x3", "SLURM_MEM_PER_CPU": "2000", "SRUN_DEBUG": "3"}
OF_A_RANK = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_what_belongs_to_a_job_or_a_rank_is_dropped_and_named() -> None:
    assert scheduler_environment(SITE | OF_A_JOB | OF_A_RANK) == SITE
    assert dropped_variables(SITE | OF_A_JOB) == sorted(OF_A_JOB)
    assert [(finding.level, finding.line) for finding in submission_findings(SITE | OF_A_JOB | OF_A_RANK)] == [
        (
            "warning",
            "environment: variables of Slurm job 55 are not passed on to the jobs: SLURM_CPU_BIND, SLURM_MEM_PER_CPU and 2 more",
        ),
        (
            "warning",
            "environment: variables of a rank are not passed on to the jobs: RANK, TORCHELASTIC_USE_AGENT_STORE, WORLD_SIZE",
        ),
    ]
    assert submission_findings(SITE) == []


def test_of_the_options_of_sbatch_those_that_say_where_to_run_are_kept_and_all_are_named() -> None:
    places = {"SBATCH_ACCOUNT": "ml", "SBATCH_RESERVATION": "course"}
    options = {"SBATCH_EXPORT": "NONE", "SBATCH_GPUS_PER_TASK": "1"}
    assert scheduler_environment(SITE | places | options) == SITE | places
    assert [finding.line for finding in submission_findings(SITE | places | options)] == [
        "environment: no effect of SBATCH_EXPORT, SBATCH_GPUS_PER_TASK; set resources in the recipe",
        "environment: SBATCH_ACCOUNT=ml holds for jobs without resources.account in the recipe",
        "environment: SBATCH_RESERVATION=course holds for jobs without --reservation in resources.flags in the recipe",
    ]


def test_filters_for_people_who_look_at_the_queue_hide_no_job() -> None:
    hiding = {"SQUEUE_PARTITION": "debug", "SCANCEL_INTERACTIVE": "1", "SINFO_FORMAT": "%N", "SACCT_FORMAT": "JobID"}
    assert scheduler_environment(SITE | hiding) == SITE
