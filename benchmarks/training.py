"""A training step against a plain PyTorch loop, and the time of a restart.

python -m benchmarks.training               one of our steps against the plain loop, on one rank
python -m benchmarks.training --restart     from the command to the first step of a continued run
"""

import argparse
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml

from benchmarks.jpegs import sample_jpegs
from benchmarks.timing import interleaved, machine, report
from data.building.build import build_shards
from data.stream import MicroBatch
from models.norm import move_running_statistics, recorded_statistics
from pipeline.faults.preemption import REASONS
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks, join_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.training.images import normalized
from pipeline.training.loss import class_targets, classification_loss
from pipeline.training.step import StepContext, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_batches import open_stream
from pipeline.weights import build_model
from pipeline.zero.engine import build_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variant", default="coatnet_0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--precision", choices=["fp32", "bf16_autocast", "bf16"], default="fp32")
    parser.add_argument("--stages", type=int, nargs="*", default=[1], help="ZeRO stages")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder), arguments)
        if arguments.restart:
            report("From the command to the first step", _restart(recipe, arguments.rounds), arguments.json)
            return
        ranks = _alone(len(os.sched_getaffinity(0)))
        print(machine(ranks.device))
        report(f"A step of {arguments.variant}", _steps(recipe, arguments, ranks), arguments.json)


def _recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """A recipe on a few generated images."""
    for number, file in enumerate(sample_jpegs(None, 64)):
        (folder / "images" / str(number % 4)).mkdir(parents=True, exist_ok=True)
        (folder / "images" / str(number % 4) / f"{number}.jpg").write_bytes(file)
    build_shards(folder / "images", folder / "shards", samples_per_shard=16, validation_per_class=2)
    recipe = {
        "name": "benchmark",
        "stages": {
            "pretrain": {
                "resolution": arguments.image_size,
                "steps": 1_000_000,
                "data": {"train": "shards/train", "validation": "shards/validation", "lanes": 1, "workers": 1},
                "model": {"name": arguments.variant, "drop_path_rate": 0.2},
                "batch": {
                    "global_size": arguments.micro_batch * arguments.micro_batches,
                    "micro_size": arguments.micro_batch,
                },
                "precision": arguments.precision,
                "optimizer": {"peak_learning_rate": 1e-4},
                "checkpoint": {"every_steps": 2},
                "evaluation": {"every_steps": 10**6},  # at the end alone
                "log": {"every_steps": 1},
            }
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _alone(threads: int) -> Ranks:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return join_ranks(threads)


def _steps(recipe: Path, arguments: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """Steps on the same micro-batches again and again, without reading."""
    planned = _plan(recipe, 1, ranks)
    batches = list(itertools.islice(open_stream(planned, 0, 1, 0), arguments.micro_batches))
    contestants: dict[str, Callable[[], object]] = {}
    if arguments.precision == "fp32":
        contestants["bare PyTorch loop"] = _bare_step(planned, batches, ranks)
    for stage in arguments.stages:
        contestants[f"ours, ZeRO {stage}"] = _our_step(_plan(recipe, stage, ranks), batches, ranks)
    timings = interleaved(contestants, rounds=arguments.rounds, device=ranks.device)
    reference = next(iter(timings.values()))
    return [
        {
            "loop": name,
            "milliseconds": timing.median * 1e3,
            "times the first": 1 / timing.speed_against(reference),
            "images per second": planned.stage.batch.global_size / timing.median,
        }
        for name, timing in timings.items()
    ]


def _plan(recipe: Path, zero_stage: int, ranks: Ranks) -> TrainPlan:
    planned = plan_stage(load_recipe(recipe, [f"zero_stage={zero_stage}"]), "pretrain", ranks.world_size)
    assert isinstance(planned, TrainPlan)
    return planned


def _our_step(plan: TrainPlan, batches: list[MicroBatch], ranks: Ranks) -> Callable[[], object]:
    engine = build_engine(build_model(plan, ranks.device), plan.stage, ranks)
    engine.train()
    reader, steps = itertools.cycle(batches), itertools.count()
    watchdog = Watchdog(plan.stage.watchdog, 0, 1, "node", Path(os.devnull), _end)
    context = StepContext(engine, plan, ranks, StepClock(ranks.device), watchdog)
    message = StepMessage([0.0] * len(REASONS), 0.0, [0.0] * 2)
    return lambda: take_step(context, reader, next(steps), message)


def _end(code: int, message: str) -> NoReturn:
    raise SystemExit(f"{code}: {message}")


def _bare_step(plan: TrainPlan, batches: list[MicroBatch], ranks: Ranks) -> Callable[[], object]:
    """The usual loop for this model on one device: the definition of a step, without ranks or DeepSpeed."""
    stage = plan.stage
    model = build_model(plan, ranks.device).train()
    spared = model.no_weight_decay()
    decayed = [p for name, p in model.named_parameters() if name not in spared]
    undecayed = [p for name, p in model.named_parameters() if name in spared]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": stage.optimizer.weight_decay}, {"params": undecayed, "weight_decay": 0.0}],
        lr=stage.optimizer.peak_learning_rate,
        fused=True,
    )
    steps = itertools.count()

    def step() -> float:
        total, number = torch.zeros((), device=ranks.device), next(steps)
        for place, batch in enumerate(batches):
            images = normalized(batch.images, ranks.device, torch.float32)
            labels = torch.from_numpy(batch.labels).to(ranks.device)
            targets = class_targets(labels, len(plan.classes), kind=stage.loss.kind, label_smoothing=0.0)
            torch.manual_seed(int(np.random.SeedSequence([number, place]).generate_state(1)[0]))
            loss = classification_loss(model(images), targets, stage.loss.kind).mean() / len(batches)
            torch.autograd.backward(loss)
            total += loss.detach()
        move_running_statistics(model, recorded_statistics(model) / len(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.optimizer.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def _restart(recipe: Path, rounds: int) -> list[dict[str, Any]]:
    """Continue a run that was killed after its first save; and, for comparison, import the libraries."""
    run = recipe.parent / "runs" / "benchmark" / "pretrain"
    log = run / "logs" / "rank-00000.log"
    seconds: dict[str, list[float]] = {"import torch and deepspeed": [], "command to first step": []}
    _run_until(recipe, log, "step 4/")
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, deepspeed"], check=True, capture_output=True)
        seconds["import torch and deepspeed"].append(time.perf_counter() - began)
        log.write_text("")
        (
            run / "events.jsonl"
        ).unlink()  # starts that are killed before they save are counted, and refused at some point
        began = time.perf_counter()
        _run_until(recipe, log, "images/s")
        seconds["command to first step"].append(time.perf_counter() - began)
    reference = float(np.median(seconds["import torch and deepspeed"]))
    return [
        {"what": what, "seconds": float(np.median(found)), "times the imports": float(np.median(found)) / reference}
        for what, found in seconds.items()
    ]


def _run_until(recipe: Path, log: Path, text: str) -> None:
    """Train until `text` is in the leader's log, then kill the run."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "train", str(recipe), "pretrain"], stdout=subprocess.DEVNULL, stderr=errors
        )
        while not (log.exists() and text in log.read_text()):
            if process.poll() is not None:
                errors.seek(0)
                raise SystemExit(f"the run ended: {errors.read().decode()}")
            time.sleep(0.01)
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
