"""Engines built by a process of its own, and held against the arithmetic of the partitions."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from data.files.child_process import own_packages_first, python_module
from data.files.json_records import parse_json, to_json
from pipeline.errors import RunFailed
from pipeline.recipe.schema import Precision
from pipeline.rehearsal.checkpoint_layout import CheckpointLayout
from pipeline.rehearsal.engine_on_fake_tensors import BuiltRank, FakeEngineCase
from pipeline.rehearsal.worker import FAILED, EngineRequest, EngineResult

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def build_ranks(cases: Sequence[FakeEngineCase]) -> list[tuple[BuiltRank, ...]]:
    """The engines of each case, in order.

    Raises:
        RunFailed: one cannot be built.
    """
    processes = min(len(os.sched_getaffinity(0)), sum(len(case.ranks) for case in cases))
    with tempfile.TemporaryDirectory(prefix="coatnet-rehearsal-") as name:
        folder = Path(name)
        request, result = folder / "request.json", folder / "result.json"
        request.write_text(json.dumps(to_json(EngineRequest(tuple(cases), max(1, processes), os.getpid()))))
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        # Fake tensors compute nothing, and a fork must not inherit threads.
        environment |= own_packages_first() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            python_module("pipeline.rehearsal.worker", str(request), str(result)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not result.exists():
            said = [line.removeprefix(FAILED) for line in done.stdout.splitlines() if line.startswith(FAILED)]
            reason = said[0] if said else f"its process ended with {done.returncode}"
            raise RunFailed(f"rehearsal: DeepSpeed's engine cannot be built on tensors without memory: {reason}")
        return list(parse_json(EngineResult, result.read_bytes()).cases)


def check_built(built: BuiltRank, layout: CheckpointLayout, precision: Precision) -> None:
    """Check that an engine holds and saves what the arithmetic says of its rank.

    Raises:
        RunFailed: it does not, so that what is said about the other ranks is wrong.
    """
    partitioning = layout.partitioning
    expected = partitioning.ranges(built.rank)
    for found, own in zip(built.ranges, expected, strict=False):
        if found != own:
            _refuse(built.rank, f"it optimizes {found}, and by the arithmetic of the rehearsal {own}")
    if len(built.ranges) != len(expected):
        _refuse(built.rank, f"it optimizes {len(built.ranges)} ranges of parameters instead of {len(expected)}")
    sizes = partitioning.sizes(built.rank, precision, moving_average=False)
    files = [layout.rank_file(built.rank), *([] if built.rank else layout.leader_files()[:1])]
    for what, size, by_arithmetic in (
        ("elements of float32 weights with padding", built.masters, sum(partitioning.masters(built.rank, in_use=True))),
        ("bytes of weights", built.weight_bytes, sizes.weights.bytes),
        *((f"bytes of {file.name}", built.files.get(file.name, 0), file.bytes) for file in files),
    ):
        if size != by_arithmetic:
            _refuse(built.rank, f"{what}: {size:,} instead of {by_arithmetic:,}")


def _refuse(rank: int, what: str) -> None:
    raise RunFailed(
        f"rehearsal: the engine of rank {rank}, built by DeepSpeed {metadata.version('deepspeed')}, is partitioned "
        f"otherwise than this program knows: {what}; use the version in constraints.txt"
    )
