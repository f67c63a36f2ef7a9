"""One training step on a GPU that is not there: its kernels, waits and copies, live bytes, and the least time it takes.

bash benchmarks/rehearsal/run.sh step --variant coatnet_5 --micro-batch 64 --micro-batches 2

The step is `take_step` with the engine of `build_engine`, on the first of `--world-size` ranks. README.md says what
this shows and what it cannot show.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.rehearsal.pretended_gpu import DEVICE, pretended_gpu
from benchmarks.rehearsal.recording import Recorded, Recording
from benchmarks.rehearsal.roofline import Rates
from benchmarks.timing import report
from data.stream import MicroBatch
from models.coatnet import CoAtNet
from models.complexity import _MemoryEfficientAttention, count_costs
from models.variants import VARIANTS
from pipeline.faults.preemption import REASONS
from pipeline.faults.watchdog import Watchdog
from pipeline.memory_estimate import estimate_memory
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan
from pipeline.ranks.device_settings import prepare_devices
from pipeline.ranks.distributed import Ranks
from pipeline.ranks.gpus import PEAKS
from pipeline.recipe.schema import TrainStage
from pipeline.training.pixels import pixel_allocator
from pipeline.training.step import StepContext, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_state import TrainingState
from pipeline.zero.engine import build_engine

_CLASSES = 1000
_PEAK = PEAKS["H100"]


def main() -> None:
    arguments = _arguments()
    stage = _stage(arguments)
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(arguments.world_size), "DS_ACCELERATOR": "cuda",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    warnings.filterwarnings("ignore")
    prepare_devices(gpus=True, deterministic=True)
    recorded, marks = _rehearse(stage, arguments.world_size)
    result = _summary(arguments, stage, recorded, marks)
    _print(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="coatnet_0", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step on one rank")
    parser.add_argument("--world-size", type=int, default=8, help="ranks, one of which is rehearsed")
    parser.add_argument("--precision", choices=["fp32", "bf16_autocast", "bf16"], default="bf16")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2], default=1)
    parser.add_argument("--activation-checkpointing", default="none", help="as in recipes")
    parser.add_argument("--drop-path-rate", type=float, default=0.0)
    parser.add_argument("--mixup-alpha", type=float, default=0.0)
    parser.add_argument("--ema-decay", type=float)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _stage(arguments: argparse.Namespace) -> TrainStage:
    policy = arguments.activation_checkpointing
    return TrainStage.model_validate(
        {
            "resolution": arguments.image_size,
            "steps": 10,
            "data": {"train": "none", "validation": "none"},
            "model": {"name": arguments.variant, "drop_path_rate": arguments.drop_path_rate},
            "batch": {
                "global_size": arguments.micro_batch * arguments.micro_batches * arguments.world_size,
                "micro_size": arguments.micro_batch,
            },
            "precision": arguments.precision,
            "zero_stage": arguments.zero_stage,
            "activation_checkpointing": int(policy) if policy.isdigit() else policy,
            "mixup_alpha": arguments.mixup_alpha,
            "ema_decay": arguments.ema_decay,
            "optimizer": {"peak_learning_rate": 1e-3},
        }
    )


def _rehearse(stage: TrainStage, world_size: int) -> tuple[Recorded, dict[str, int]]:
    """The second step, when everything that is made once is there, and the live bytes before it, by what made them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    ranks = Ranks(0, world_size, DEVICE)
    # All that a step asks of a plan; a whole one needs shards.
    plan = cast(TrainPlan, SimpleNamespace(stage=stage, classes=[str(n) for n in range(_CLASSES)], seed=0))
    recording, marks = Recording(), {}
    with pretended_gpu(recording.waited), recording, _MemoryEfficientAttention():
        variant, rate = stage.model.variant, stage.model.drop_path_rate
        size = (stage.resolution, stage.resolution)
        with torch.device(DEVICE):
            model = CoAtNet(variant, num_classes=_CLASSES, image_size=size, drop_path_rate=rate)
        marks["model"] = recording.recorded.live
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
            engine = build_engine(model, stage, ranks)
        marks["engine"] = recording.recorded.live
        state = TrainingState(engine, ranks, stage.ema_decay)
        marks["state"] = recording.recorded.live
        engine.train()
        watchdog = Watchdog(stage.watchdog, 0, world_size, "node", Path(os.devnull), _end)
        context = StepContext(engine, plan, ranks, StepClock(ranks.device), watchdog)
        message = StepMessage([0.0] * len(REASONS), 0.0, [0.0] * (2 * world_size))
        reader = itertools.repeat(_micro_batch(stage))
        for step in range(2):
            recording.start_over()
            engine.set_learning_rate(1e-3)
            take_step(context, reader, step, message)
            state.update_average()
    return recording.recorded, marks


def _micro_batch(stage: TrainStage) -> MicroBatch:
    size, side = stage.batch.micro_size, stage.resolution
    images, labels = pixel_allocator(DEVICE)((size, side, side, 3)), np.zeros((size, 1), np.int64)
    return MicroBatch(images, labels, np.ones(size, np.float32), [], [])


def _end(code: int, message: str) -> NoReturn:
    raise SystemExit(f"{code}: {message}")


def _summary(
    arguments: argparse.Namespace, stage: TrainStage, recorded: Recorded, marks: dict[str, int]
) -> dict[str, Any]:
    rates = Rates()
    images = arguments.micro_batch * arguments.micro_batches
    multiply_adds = sum(cost.multiply_adds for cost in count_costs(stage.model.variant, stage.resolution))
    seconds = sum(operation.seconds for operation in recorded.operations.values())
    kernels = recorded.kernels.total()
    operations = sorted(recorded.operations.items(), key=lambda item: -item[1].seconds)
    return {
        "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
        "torch": torch.__version__,
        "kernels": kernels,
        "milliseconds": seconds * 1e3,
        "host_milliseconds": kernels * rates.launch_on_host * 1e3,
        "images_per_second": images / seconds,
        "utilization": 6 * images * multiply_adds / seconds / _PEAK,
        "peak_bytes": recorded.peak,
        "estimated_bytes": estimate_memory(stage, _CLASSES, arguments.world_size).device,
        "live_bytes": {**marks, "step": recorded.live},
        "waits": [{"count": count, "kind": kind, "line": line} for (kind, line), count in recorded.waits.most_common()],
        "copies": [
            {"count": count, "kind": kind, "line": line} for (kind, line), count in recorded.copies.most_common()
        ],
        "exchanges": [
            {"collective": name, "calls": exchange.calls, "bytes": exchange.bytes}
            for name, exchange in recorded.exchanges.items()
        ],
        "operations": [{"operator": name, **dataclasses.asdict(operation)} for name, operation in operations],
    }


def _print(result: dict[str, Any], rows: int = 24) -> None:
    print(
        f"{result['kernels']:,} kernels, {result['host_milliseconds']:.1f} ms to issue; at least "
        f"{result['milliseconds']:.1f} ms on an H100, so at most {result['images_per_second']:,.0f} images/s and "
        f"{result['utilization']:.1%} utilization"
    )
    live = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in result["live_bytes"].items())
    print(
        f"live GB after {live}; peak of a step {result['peak_bytes'] / 1e9:.2f}, estimated "
        f"{result['estimated_bytes'] / 1e9:.2f}"
    )
    operations = [
        {
            "operator": row["operator"], "calls": row["calls"], "GB": row["bytes"] / 1e9,
            "TFLOP": row["operations"] / 1e12, "ms": row["seconds"] * 1e3,
            "share": row["seconds"] * 1e3 / result["milliseconds"],
        }
        for row in result["operations"]
    ]  # fmt: skip
    report("Operations, by their least time", operations[:rows], None)
    report("Operations, by calls", sorted(operations, key=lambda row: -row["calls"])[:rows], None)
    for title, name in (
        ("The host waits", "waits"),
        ("Copies that do not wait", "copies"),
        ("Exchanges of one rank", "exchanges"),
    ):
        if result[name]:
            report(title, result[name], None)
        else:
            print(f"{title}: none")


if __name__ == "__main__":
    main()
