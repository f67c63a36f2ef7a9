"""Rank processes for a test: a Python file that is started once per rank."""

import subprocess
import sys
from pathlib import Path

from tests.support.command import environment
from tests.support.ports import free_ports


def start_ranks(count: int, worker: Path, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    """`python WORKER ARGUMENTS` as `count` ranks of one process group."""
    group = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(worker), *map(str, arguments)],
            env=environment() | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def end_well(ranks: list[subprocess.Popen[str]], seconds: float = 900) -> None:
    """Wait until all ranks have ended; fails with their output unless all exit codes are 0."""
    outputs = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)[-4000:]


def run_ranks(count: int, worker: Path, *arguments: str | Path) -> None:
    """`start_ranks`, then `end_well`."""
    end_well(start_ranks(count, worker, *arguments))
