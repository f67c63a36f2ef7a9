"""Counts the collectives of real steps: `python collectives_worker.py FILE CASE...`.

A case is ZERO-PRECISION-MICRO_BATCHES-GRADIENTS, with ZeRO 3 and -PERSISTENT-LIVE: the elements of a weight up to which
it stays gathered, and those of all weights up to which they are kept for the backward.

For each case, two steps of a small model under DeepSpeed as rank 0 of four, in torch's fake process group, which sends
nothing. FILE gets, for the second step, the bytes of whole tensors that each kind of collective had in each micro-batch.
Norms and losses, some numbers each, are left out.
"""

import gc
import importlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.registry import create_model
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import TrainStage
from pipeline.zero import engine as zero_engine

MODEL, SIZE, CLASSES, WORLD = "coatnet_debug", 32, 10, 4
_SMALL = 1000  # bytes


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the whole tensors that c10d's operators are given, by kind and micro-batch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.micro_batch = 0
        self.sizes: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d"):
            # An all-gather has the whole and a share of it, a reduce-scatter as well.
            size = max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor))
            small = name.startswith("c10d.allreduce_.") and size < _SMALL
            if not small:
                self.sizes[name.split(".")[1]][self.micro_batch] += size
        return function(*args, **(kwargs or {}))


def count(case: str) -> dict[str, dict[int, int]]:
    zero_stage, precision, rounds, gradients, *limits = case.split("-")
    number = int(rounds)
    stage = TrainStage.model_validate(
        {
            "resolution": SIZE, "steps": 2, "data": {"train": "none", "validation": "none"},
            "model": {"name": MODEL}, "batch": {"global_size": WORLD * number, "micro_size": 1},
            "precision": precision, "zero_stage": int(zero_stage), "optimizer": {"peak_learning_rate": 1e-3},
            "communication": {"gradients": gradients, "bucket_size": 10**6},
        }
    )  # fmt: skip
    model = create_model(MODEL, num_classes=CLASSES, image_size=SIZE)
    model.initialize(0)
    with _limits(*map(int, limits)):
        engine = zero_engine.build_engine(model, stage, Ranks(0, WORLD, torch.device("cpu")))
    engine.set_learning_rate(1e-3)
    engine.train()
    for _ in range(2):
        found = Collectives()
        with found:
            for turn in range(number):
                found.micro_batch = turn
                loss = engine(torch.randn(1, SIZE, SIZE, 3).to(engine.dtype)).float().square().mean()
                engine.backward(loss)
                if turn < number - 1:
                    engine.accumulate()
            engine.step(loss.detach())
    return {kind: dict(sizes) for kind, sizes in found.sizes.items()}


@contextmanager
def _limits(persistent: int | None = None, live: int = 10**9) -> Iterator[None]:
    """Inside, engines are configured with these; the trainer leaves them to DeepSpeed."""
    real = zero_engine._configuration

    def configuration(stage: TrainStage, ranks: Ranks) -> dict[str, Any]:
        found = real(stage, ranks)
        if persistent is not None:
            found["zero_optimization"] |= {
                "stage3_param_persistence_threshold": persistent,
                "stage3_max_live_parameters": live,
                "stage3_max_reuse_distance": live,
            }
        return found

    zero_engine._configuration = configuration
    try:
        yield
    finally:
        zero_engine._configuration = real


def main() -> None:
    path, *cases = sys.argv[1:]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(WORLD)}
    # ZeRO 3 asks the ranks whether they agree, and the fake group has no answers.
    for name in ("partition_parameters", "parameter_offload", "partitioned_param_coordinator"):
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        if hasattr(module, "assert_ints_same_as_other_ranks"):
            setattr(module, "assert_ints_same_as_other_ranks", lambda *_: None)  # noqa: B010
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    found = {}
    for case in cases:
        found[case] = count(case)
        gc.collect()
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
