"""What this machine has, from files as kernels write them: both versions of cgroups, containers, no cgroups at all."""

import os
import platform
from pathlib import Path

import pytest

from pipeline.host import Host, out_of_memory_kills, processor_name, this_host

GB = 10**9
CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", f"MemTotal:       {64 * GB // 1024} kB\nMemFree: 1 kB\n")
    return tmp_path / "proc"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_cgroups_it_is_the_machine(proc: Path, tmp_path: Path) -> None:
    assert this_host(proc, tmp_path / "none") == Host(CORES, 64 * GB, limited=False)
    assert out_of_memory_kills(proc, tmp_path / "none") is None
    write(proc / "vmstat", "nr_free_pages 5\noom_kill 3\n")
    assert out_of_memory_kills(proc, tmp_path / "none") == 3


def test_the_processor_has_its_name(tmp_path: Path) -> None:
    assert processor_name(tmp_path) == platform.machine()
    write(
        tmp_path / "cpuinfo",
        "processor\t: 0\nmodel name\t: AMD EPYC 9654\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n",
    )
    assert processor_name(tmp_path) == "AMD EPYC 9654"


def test_the_tightest_limit_of_the_nested_groups_counts(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(proc / "self/cgroup", "0::/user.slice/job.scope\n")
    write(groups / "user.slice/memory.max", f"{8 * GB}\n")
    write(groups / "user.slice/job.scope/memory.max", "max\n")
    write(groups / "user.slice/job.scope/memory.events", "low 0\noom 2\noom_kill 1\n")
    write(groups / "user.slice/job.scope/cpu.max", "50000 100000\n")
    assert this_host(proc, groups) == Host(1, 8 * GB, limited=True)
    assert this_host(proc, groups).text == "1 core, 8.0 GB of memory (the limit of its cgroup)"
    assert out_of_memory_kills(proc, groups) == 1


def test_the_first_version_of_cgroups_has_other_files(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(proc / "self/cgroup", "4:memory:/job\n1:cpu,cpuacct:/\n0::/\n")
    write(groups / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(groups / "memory/job/memory.limit_in_bytes", f"{4 * GB}\n")
    write(groups / "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    write(groups / "cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(groups / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert this_host(proc, groups) == Host(CORES, 4 * GB, limited=True)
    assert out_of_memory_kills(proc, groups) == 7


def test_in_a_container_whose_group_is_named_from_outside_the_visible_ones_count(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(proc / "self/cgroup", "0::/kubepods/pod1/container2\n")
    write(groups / "memory.max", f"{2 * GB}\n")
    write(groups / "memory.events", "oom_kill 0\n")
    assert this_host(proc, groups).memory == 2 * GB
    assert out_of_memory_kills(proc, groups) == 0


def test_the_processor_is_what_the_kernel_calls_it_and_the_architecture_where_it_has_no_name(proc: Path) -> None:
    assert processor_name(proc) == platform.machine()
    write(proc / "cpuinfo", "processor\t: 0\nBogoMIPS\t: 50.00\n")  # as on many machines with ARM
    assert processor_name(proc) == platform.machine()
    write(proc / "cpuinfo", "processor\t: 0\nmodel name\t:\nmodel name\t: AMD EPYC 9654: 96 cores\nmodel name\t: x\n")
    assert processor_name(proc) == "AMD EPYC 9654: 96 cores"
