"""One rank of the tests of an engine's state: `python state_worker.py FOLDER CASE...`, a case being STAGE-PRECISION.

For each case, two steps of two micro-batches of a small model. The leader writes FOLDER/CASE-RANKS.json: the bytes held
for each parameter, and the norms and histograms of the shards beside those of whole weights and of a kept copy.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard.summary import make_histogram

from models.registry import create_model
from pipeline.monitoring.histograms import EDGES, weight_histograms
from pipeline.monitoring.norms import AdamWStep, stage_index, stage_names, weight_and_update_norms
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks
from pipeline.recipe.schema import TrainStage
from pipeline.zero.engine import ZeroEngine, build_engine
from pipeline.zero.fragments import Fragment

RATE = 1e-2
LARGE = 10**8  # bytes: a tensor larger than the model is a bucket


def stage_of(case: str, ranks: Ranks) -> TrainStage:
    zero_stage, precision = case.split("-")
    return TrainStage.model_validate(
        {
            "resolution": 32,
            "steps": 2,
            "data": {"train": "none", "validation": "none"},
            "model": {"name": "coatnet_nano"},
            "batch": {"global_size": 4 * ranks.world_size, "micro_size": 2},
            "precision": precision,
            "zero_stage": int(zero_stage),
            "optimizer": {"peak_learning_rate": RATE},
        }
    )


def storages() -> dict[int, int]:
    """Address and bytes of the storages of all tensors created since the last `gc.freeze`."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # By type, as some modules answer isinstance with a warning.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


class Held:
    """The most memory in use at the end of a backward, and the buckets seen during one."""

    def __init__(self) -> None:
        self.state = 0
        self.buckets = 0

    def look(self, model: torch.nn.Module, *, inside: bool = False) -> None:
        # Held while counting: gradients become Python objects only when they are accessed.
        gradients = [parameter.grad for parameter in model.parameters()]
        found = list(storages().values())
        for _ in range(0 if inside else 4):
            # A thread of the process group may briefly hold tensors that it has summed.
            time.sleep(0.05)
            found = min(found, list(storages().values()), key=sum)
        del gradients
        self.buckets = max(self.buckets, sum(size for size in found if size >= LARGE))
        if not inside:
            self.state = max(self.state, sum(size for size in found if size < LARGE))


def train_and_measure(case: str, ranks: Ranks) -> dict[str, Any]:
    gc.collect()
    gc.freeze()
    stage = stage_of(case, ranks)
    model = create_model("coatnet_nano", num_classes=10, image_size=(32, 32))
    model.initialize(0)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    engine = build_engine(model, stage, ranks)
    held = Held()

    def looking(module: object, arguments: object, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: held.look(engine.module, inside=True))  # type: ignore[no-untyped-call]

    hook = engine.module.blocks[2].register_forward_hook(looking)
    engine.set_learning_rate(RATE)
    generator = torch.Generator().manual_seed(ranks.rank)
    everything: list[Fragment] = []
    kept: list[torch.Tensor] = []
    for step in range(2):
        for number in range(2):
            images = torch.randn(2, 32, 32, 3, generator=generator)
            logits = engine(images.bfloat16() if stage.precision == "bf16" else images)
            engine.backward(logits.float().square().mean())
            del images, logits
            if step == 1:
                held.look(engine.module)
            if number == 0:
                engine.accumulate()
        if step == 1:
            everything = engine.fragments()
            kept = [fragment.tensors["master"].double() for fragment in everything]
        engine.step(torch.zeros(()))
    hook.remove()
    return {
        "parameters": sum(sizes.values()),
        "held": held.state,
        "buckets": held.buckets,
        **norms(everything, kept, engine, stage, ranks),
        **counts(everything, sizes, ranks),
    }


def norms(
    everything: list[Fragment], kept: list[torch.Tensor], engine: ZeroEngine, stage: TrainStage, ranks: Ranks
) -> dict[str, Any]:
    variant = engine.module.variant
    last_step = AdamWStep(stage.optimizer, RATE, engine.optimizer_steps, engine.parameters.undecayed, {})
    found = weight_and_update_norms(everything, variant, last_step, ranks)
    names, place = stage_names(variant), stage_index(variant)
    squares = torch.zeros(2, len(names), dtype=torch.float64)
    for fragment, copy in zip(everything, kept, strict=True):
        if fragment.saved_here:
            after = fragment.tensors["master"].double()
            squares[0, place(fragment.parameter)] += after.square().sum()
            squares[1, place(fragment.parameter)] += (copy - after).square().sum()
    weights, updates = ranks.sum(squares).sqrt().tolist()
    expected = {f"weight_norm/{name}": weight for name, weight in zip(names, weights, strict=True)}
    pairs = zip(names, weights, updates, strict=True)
    expected |= {f"update_ratio/{name}": update / weight for name, weight, update in pairs}
    return {"norms": found, "norms_of_a_copy": expected}


def counts(everything: list[Fragment], sizes: dict[str, int], ranks: Ranks) -> dict[str, Any]:
    found = weight_histograms(everything, list(sizes), ranks)
    expected = {}
    for name, size in sizes.items():
        whole = torch.zeros(size)
        for fragment in everything:
            if fragment.parameter == name and fragment.saved_here:
                whole[fragment.start : fragment.stop] = fragment.tensors["master"]
        histogram = make_histogram(ranks.sum(whole).numpy(), np.array(EDGES, np.float32))  # type: ignore[no-untyped-call]
        expected[name] = [count for count in histogram.bucket if count]
    return {
        "histograms": {name: found[name].counts[found[name].counts > 0].tolist() for name in sizes},
        "histograms_of_whole_weights": expected,
    }


def main(folder: Path, cases: list[str]) -> None:
    ranks = join_ranks(1)
    for case in cases:
        measured = train_and_measure(case, ranks)
        if ranks.is_leader:
            (folder / f"{case}-{ranks.world_size}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave_ranks()
