"""Which additional options of sbatch a recipe may give."""

from collections.abc import Iterable

_SETTINGS = {
    "--nodes": "resources.nodes",
    "--ntasks-per-node": "resources.ranks",
    "--tasks-per-node": "resources.ranks",
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
    "--job-name", "--output", "--error", "--chdir", "--workdir", "--export", "--export-file", "--open-mode", "--wrap",
    "--array", "--dependency", "--signal", "--requeue", "--no-requeue", "--ntasks", "--parsable", "--test-only",
    "--wait",
)  # fmt: skip
_SHORT = {
    "-N": "--nodes", "-c": "--cpus-per-task", "-t": "--time", "-p": "--partition", "-A": "--account", "-q": "--qos",
    "-C": "--constraint", "-J": "--job-name", "-o": "--output", "-e": "--error", "-D": "--chdir", "-a": "--array",
    "-d": "--dependency", "-n": "--ntasks", "-W": "--wait", "-h": "--help", "-u": "--usage", "-V": "--version",
}  # fmt: skip
_SHORT_WITH_VALUE = "ABCDFGJLMNPSUabcdeimnopqtwx"
_WITHOUT_VALUE = (
    "--consolidate-segments", "--contiguous", "--exclusive", "--external-launcher", "--get-user-env", "--hold",
    "--ignore-pbs", "--nice", "--no-kill", "--oom-kill-step", "--overcommit", "--oversubscribe", "--propagate",
    "--quiet", "--reboot", "--resv-ports", "--share", "--spread-job", "--spread-segments", "--stepmgr",
    "--use-min-nodes", "--verbose",
)  # fmt: skip
"""Options of sbatch that may stand alone, up to version 25.05; any other one takes the next word for its value."""
_NO_JOB = ("--help", "--usage", "--version")


def check_flag(flag: str) -> None:
    """Check one of `resources.flags`.

    Raises:
        ValueError: it is not an option of sbatch with its value in the same word, or is one that has a setting or that
            the program gives itself. Like sbatch, this takes the beginning of an option's name for the option, and
            `-sD/` for `-s -D/`.
    """
    if not flag.startswith("-") or flag in ("-", "--"):
        raise ValueError(f"{flag!r} is not an option of sbatch; write it as one word, such as --nodelist=node[1-4]")
    if flag.startswith("--"):
        name, equals, _ = flag.partition("=")
        _refuse(flag, (option for option in (*_SETTINGS, *_OWN, *_NO_JOB) if option.startswith(name)))
        if not equals and not any(option.startswith(name) for option in _WITHOUT_VALUE):
            raise ValueError(f"{flag!r} would take the next word for its value; write {name}=VALUE")
        return
    for place, letter in enumerate(flag[1:], 2):
        _refuse(flag, [_SHORT[f"-{letter}"]] if f"-{letter}" in _SHORT else [])
        if letter in _SHORT_WITH_VALUE:
            if place == len(flag):
                raise ValueError(f"{flag!r} would take the next word for its value; write it as one word: {flag}VALUE")
            return


def excluded_nodes(flags: Iterable[str]) -> str:
    """The nodes that the last `--exclude` or `-x` among flags that passed `check_flag` names; empty without one."""
    found = ""
    for flag in flags:
        name, _, value = flag.partition("=")
        if len(name) > len("--exclu") and "--exclude".startswith(
            name
        ):  # a shorter beginning is that of --exclusive, too
            found = value
        elif not flag.startswith("--"):
            first = next((place for place, letter in enumerate(flag) if letter in _SHORT_WITH_VALUE), 0)
            found = flag[first + 1 :] if flag[first] == "x" else found
    return found


def _refuse(flag: str, options: Iterable[str]) -> None:
    for option in options:
        if option in _SETTINGS:
            raise ValueError(f"{flag!r} is not given as a flag; set {_SETTINGS[option]}")
        if option in _NO_JOB:
            raise ValueError(f"{flag!r} cannot be given: with {option}, nothing is submitted")
        raise ValueError(f"{flag!r} cannot be given: the program sets {option} itself")
