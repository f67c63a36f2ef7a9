"""How long a save stops training, and how long it takes until the checkpoint is on the disk, by its size.

python -m benchmarks.saving --megabytes 64 256 1024 --folder FOLDER_ON_THE_DISK_IN_QUESTION
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.timing import machine, report
from data.remote.storage import Storage
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import CheckpointFacts, RunDigests, RunFacts
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.run_folder import RunFolder
from pipeline.zero.fragments import Fragment

_KINDS = ("master", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 256], help="sizes of one rank's state")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; by default that of temporary files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    print(machine(device))
    rows = saving(arguments.megabytes, arguments.rounds, device, arguments.folder)
    report("A save of one rank", rows, arguments.json)


def saving(
    megabytes: Sequence[int], rounds: int, device: torch.device, folder: Path | None = None
) -> list[dict[str, Any]]:
    """A row for each size: medians over the rounds, in which ours and the plain way take turns.

    The first save also allocates its memory. `plain` is a copy to the host and safetensors' own `save_file`, flushed to
    the disk, while training waits; it neither hashes nor reads back. `Python beside it` is the speed of a Python loop
    during a save, relative to its speed alone.
    """
    rows = []
    ranks = Ranks(0, 1, device)
    for size in megabytes:
        state = _state(size * 1_000_000, device)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            run, plain = RunFolder(Path(name)), Path(name) / "plain.safetensors"
            place = CheckpointStore(str(run.checkpoints), Storage(), run.checkpoints)
            stalls, durable, plains, beside = [], [], [], []
            with Saver(place, run, CheckpointSettings(keep_last=1), ranks) as saver:
                for step in range(1, rounds + 2):
                    state = replace(state, facts=replace(state.facts, step=step))
                    alone = _python_speed(0.2)
                    stalls.append(saver.save(state))
                    during = _python_speed(0.05)
                    saver.finish_or_retry(attempts=1)
                    (saved,) = saver.reports()
                    durable.append(saved.seconds)
                    beside.append(during / alone)
                    plains.append(_plain(state, plain))
        rows.append(
            {
                "megabytes": size,
                "first stall, ms": 1e3 * stalls[0],
                "stall, ms": 1e3 * statistics.median(stalls[1:]),
                "until published, ms": 1e3 * statistics.median(durable[1:]),
                "plain, ms": 1e3 * statistics.median(plains[1:]),
                "stall against plain": statistics.median(a / b for a, b in zip(stalls[1:], plains[1:], strict=True)),
                "Python beside it": statistics.median(beside[1:]),
            }
        )
    return rows


def _state(size: int, device: torch.device) -> LiveState:
    """A state of `size` bytes: 64 parameters with AdamW's moments."""
    elements = max(1, size // (64 * 4 * len(_KINDS)))
    names = [f"parameter{number}" for number in range(64)]
    fragments = [
        Fragment(name, 0, elements, {kind: torch.randn(elements, device=device) for kind in _KINDS}, True)
        for name in names
    ]
    model = {"name": "none", "num_classes": 0, "image_size": 1}
    run = RunFacts("saving", "fp32", model, RunDigests("", "", ""))
    return LiveState(CheckpointFacts(run, 0, 0, 0, 0, 1), fragments, {}, dict.fromkeys(names, (elements,)))


def _plain(state: LiveState, path: Path) -> float:
    began = time.perf_counter()
    save_file({f"{kind}.{f.parameter}": t.cpu() for f in state.fragments for kind, t in f.tensors.items()}, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _python_speed(seconds: float) -> float:
    """Iterations per second of a Python loop, which needs Python's lock for each."""
    turns, done = 0, threading.Event()
    began = time.perf_counter()
    timer = threading.Timer(seconds, done.set)
    timer.start()
    while not done.is_set():
        turns += 1
    timer.join()
    return turns / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
