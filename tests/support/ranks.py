"""Rank processes for a test: a Python file that is started once per rank."""

import tempfile
from pathlib import Path

from tests.support.command import start_program
from tests.support.ports import free_ports


def run_ranks(count: int, worker: Path, *arguments: str | Path, seconds: float = 900) -> None:
    """`python WORKER ARGUMENTS` as `count` ranks of one process group; fails with their output unless all exit with 0."""
    group = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("ab") as output:
        ranks = [
            start_program(worker, *arguments, output=output, **group, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(count)
        ]
        try:
            codes = [rank.wait(seconds) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert not any(codes), f"{codes}\n{Path(output.name).read_text()[-8000:]}"
