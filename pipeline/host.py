"""Cores and memory that this process may use, within the limits of its cgroups; and the kernel's kills."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.text.counted import counted

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Host:
    """Cores and memory for the processes of a run on this machine."""

    cores: int
    memory: int
    """Bytes."""
    limited: bool
    """Whether a cgroup, such as that of a container or job, sets the memory, rather than the size of the machine."""

    @property
    def text(self) -> str:
        """`2 cores, 24.0 GB of memory`."""
        limit = " (the limit of its cgroup)" if self.limited else ""
        return f"{counted(self.cores, 'core')}, {self.memory / 1e9:.1f} GB of memory{limit}"


def this_host(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Host:
    """The machine that this process runs on; the arguments are where the kernel's files are."""
    total = _total_memory(proc)
    limits = [limit for group in _groups(proc, cgroups) if (limit := _memory_limit(group)) is not None]
    least = min([total, *limits])
    quotas = [quota for group in _groups(proc, cgroups) if (quota := _cores_limit(group)) is not None]
    return Host(max(1, min([len(os.sched_getaffinity(0)), *quotas])), least, least < total)


def processor_name(proc: Path = _PROC) -> str:
    """The name of the processor, as the kernel has it; `CPU` if it has none."""
    lines = (_text(proc / "cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def out_of_memory_kills(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """How many processes of this process's cgroup the kernel has killed for lack of memory, or of the whole machine
    where the cgroup does not count; None if neither is known.
    """
    own = [
        count
        for group in _groups(proc, cgroups)[:2]  # the innermost of both versions of cgroups
        for name in ("memory.events", "memory.oom_control")
        if (count := _field(group / name, "oom_kill")) is not None
    ]
    return max(own) if own else _field(proc / "vmstat", "oom_kill")


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """The folders of this process's memory and cpu cgroups of both versions, each followed by those around it.

    In a container the kernel may name folders outside of it, which do not exist inside; its own is then the topmost.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    chains: list[list[Path]] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
        elif {"memory", "cpu"} & set(controllers.split(",")):
            roots = [cgroups / controllers]
        else:
            continue
        for root in roots:
            chain = [folder for folder in _upwards(root, path) if _has_limits(folder)]
            if chain:
                chains.append(chain)
    innermost = [chain[0] for chain in chains if _counts_kills(chain[0])]
    return list(dict.fromkeys([*innermost, *(folder for chain in chains for folder in chain)]))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    folder = root / path.strip("/")
    while True:
        yield folder
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _has_limits(folder: Path) -> bool:
    names = ("memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_quota_us")
    return any((folder / name).exists() for name in names) or _counts_kills(folder)


def _counts_kills(folder: Path) -> bool:
    return (folder / "memory.events").exists() or (folder / "memory.oom_control").exists()


def _memory_limit(group: Path) -> int | None:
    """Bytes; version 1 writes a number near 2^63 if there is none, which is above any total."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _text(group / name)
        if text.isdigit():
            return int(text)
    return None


def _cores_limit(group: Path) -> int | None:
    """Whole cores that the quota of the group allows, rounded up."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not period:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() and int(period) else None


def _total_memory(proc: Path) -> int:
    kilobytes = _field(proc / "meminfo", "MemTotal:")
    return kilobytes * 1024 if kilobytes else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _field(file: Path, name: str) -> int | None:
    """The number after `name` on a line of a file of the kernel."""
    for line in _text(file).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
