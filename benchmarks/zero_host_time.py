"""Processor time that DeepSpeed's ZeRO 3 adds to a micro-batch on the host, beside ZeRO 2.

    python -m benchmarks.zero_host_time                # both ZeRO stages of coatnet_nano in bf16; half a minute
    python -m benchmarks.zero_host_time --rounds 8 --json zero.json

Rank 0 of 4 with torch's fake process group, whose collectives return at once: nothing is sent, and weights are not
copied, so that what is left is the bookkeeping of gathers and releases for each parameter. Both stages take turns, each
time in a process of its own.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.timing import report
from models.coatnet import CoAtNet
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import TrainStage
from pipeline.zero.engine import build_engine

_WORLD, _SIDE, _IMAGES, _WARM_UP, _STEPS = 4, 32, 2, 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--zero-stage", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.zero_stage is not None:
        print(*_measure(arguments.zero_stage, arguments.micro_batches))
        return
    added = []
    tensors = 0
    for _ in range(arguments.rounds):
        seconds = []
        for zero_stage in (2, 3):
            command = [sys.executable, "-m", "benchmarks.zero_host_time", "--zero-stage", str(zero_stage)]
            command += ["--micro-batches", str(arguments.micro_batches)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
            seconds.append(float(answer[-2]))
            tensors = int(answer[-1])
        added.append((seconds[1] - seconds[0]) / arguments.micro_batches)
    rows = [
        {
            "tensors": tensors,
            "added ms a micro-batch": 1e3 * statistics.median(added),
            "added us a tensor": 1e6 * statistics.median(added) / tensors,
        }
    ]
    report("ZeRO 3 beside ZeRO 2, processor time of the host", rows, arguments.json)


def _measure(zero_stage: int, micro_batches: int) -> tuple[float, int]:
    """Seconds of processor time of a step, and the number of parameter tensors."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(_WORLD), "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # fmt: skip
    if zero_stage == 3:
        _agree_with_oneself()
    stage = TrainStage.model_validate(
        {
            "resolution": _SIDE, "steps": 10, "data": {"train": "none", "validation": "none"},
            "model": {"name": "coatnet_nano"}, "precision": "bf16", "zero_stage": zero_stage,
            "batch": {"global_size": _IMAGES * _WORLD * micro_batches, "micro_size": _IMAGES},
            "optimizer": {"peak_learning_rate": 1e-3},
        }
    )  # fmt: skip
    dist.init_process_group("fake", rank=0, world_size=_WORLD, store=FakeStore())
    model = CoAtNet(stage.model.variant, num_classes=10, image_size=(_SIDE, _SIDE))
    with contextlib.redirect_stdout(sys.stderr):
        engine = build_engine(model, stage, Ranks(0, _WORLD, torch.device("cpu")))
    engine.train()
    engine.set_learning_rate(1e-3)
    began = 0.0
    for step in range(_WARM_UP + _STEPS):
        if step == _WARM_UP:
            began = time.process_time()
        for number in range(micro_batches):
            images = torch.zeros(_IMAGES, _SIDE, _SIDE, 3, dtype=engine.dtype)
            engine.backward(engine(images).float().square().mean())
            if number < micro_batches - 1:
                engine.accumulate()
        engine.step(torch.tensor(1.0))
    return (time.process_time() - began) / _STEPS, len(list(model.parameters()))


def _agree_with_oneself() -> None:
    """Leave out that ZeRO 3 compares integers with those of the other ranks, which fake collectives do not answer."""
    for name in ("parameter_offload", "partition_parameters", "partitioned_param_coordinator"):
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        if hasattr(module, "assert_ints_same_as_other_ranks"):
            vars(module)["assert_ints_same_as_other_ranks"] = lambda *arguments, **keywords: None


if __name__ == "__main__":
    main()
