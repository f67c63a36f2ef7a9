"""Which additional options of sbatch a recipe may give."""

_SETTINGS = {
    "--nodes": "resources.nodes",
    "--ntasks-per-node": "resources.ranks",
    "--gpus-per-node": "resources.gpus_per_rank",
    "--cpus-per-task": "resources.cpus_per_rank",
    "--time": "resources.time_limit",
    "--mem": "resources.memory_gigabytes",
    "--partition": "resources.partition",
    "--account": "resources.account",
    "--qos": "resources.qos",
    "--constraint": "resources.constraint",
}
_OWN = (
    "--job-name", "--output", "--error", "--chdir", "--export", "--export-file", "--open-mode", "--wrap", "--array",
    "--dependency", "--signal", "--requeue", "--no-requeue", "--ntasks", "--parsable", "--test-only", "--wait",
)  # fmt: skip
_SHORT = {
    "-N": "--nodes", "-c": "--cpus-per-task", "-t": "--time", "-p": "--partition", "-A": "--account", "-q": "--qos",
    "-C": "--constraint", "-J": "--job-name", "-o": "--output", "-e": "--error", "-D": "--chdir", "-a": "--array",
    "-d": "--dependency", "-n": "--ntasks", "-W": "--wait",
}  # fmt: skip


def check_flag(flag: str) -> None:
    """Check one of `resources.flags`.

    Raises:
        ValueError: it is not an option of sbatch, or is one that has a setting or that the program gives itself. Like
            sbatch, this takes the beginning of an option's name for the option.
    """
    if not flag.startswith("-") or flag in ("-", "--"):
        raise ValueError(f"{flag!r} is not an option of sbatch; write it as one word, such as --nodelist=node[1-4]")
    if flag.startswith("--"):
        name = flag.partition("=")[0]
        options = [option for option in (*_SETTINGS, *_OWN) if option.startswith(name)]
    else:
        options = [_SHORT[flag[:2]]] if flag[:2] in _SHORT else []
    for option in options:
        if option in _SETTINGS:
            raise ValueError(f"{flag!r} is not given as a flag; set {_SETTINGS[option]}")
        raise ValueError(f"{flag!r} cannot be given: the program sets {option} itself")
