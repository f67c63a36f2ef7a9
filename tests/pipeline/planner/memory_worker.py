"""One rank of the test of memory: `python memory_worker.py FILE CASE...`, a case being STAGE-PRECISION-POLICY.

For each case, two steps of two micro-batches of a small model under DeepSpeed. FILE gets the peak of the bytes of living
tensors, without DeepSpeed's buckets, which are larger than the model.
"""

import gc
import json
import math
import sys
from pathlib import Path

import torch

from models.norm import move_running_statistics, recorded_statistics
from models.registry import create_model
from pipeline.planner.trace.live_bytes import LiveBytes, living_tensors
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks
from pipeline.recipe.schema import TrainStage
from pipeline.training.loss import class_targets, classification_loss
from pipeline.zero.engine import build_engine

MODEL, SIZE, CLASSES, MICRO_BATCH = "coatnet_nano", 32, 10, 16
BUCKET = 10**8  # bytes: a tensor larger than the model is a bucket


class WithoutBuckets(LiveBytes):  # type: ignore[no-untyped-call]
    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() < BUCKET:
            super()._add(tensor)


def peak(case: str, ranks: Ranks) -> int:
    zero_stage, precision, policy = case.split("-")
    stage = TrainStage.model_validate(
        {
            "resolution": SIZE, "steps": 2, "data": {"train": "none", "validation": "none"},
            "model": {"name": MODEL}, "batch": {"global_size": 2 * MICRO_BATCH, "micro_size": MICRO_BATCH},
            "precision": precision, "zero_stage": int(zero_stage), "activation_checkpointing": policy,
            "optimizer": {"peak_learning_rate": 1e-3},
        }
    )  # fmt: skip
    before = {id(tensor) for tensor in living_tensors("cpu")}
    model = create_model(MODEL, num_classes=CLASSES, image_size=SIZE)
    model.initialize(0)
    engine = build_engine(model, stage, ranks)
    engine.set_learning_rate(1e-3)
    engine.train()
    live = WithoutBuckets("cpu", [one for one in living_tensors("cpu") if id(one) not in before])
    with live:
        for _ in range(2):
            with engine.micro_batches(2):
                for turn in range(2):
                    images = torch.randn(MICRO_BATCH, SIZE, SIZE, 3)
                    labels = torch.zeros(MICRO_BATCH, 1, dtype=torch.int64)
                    targets = class_targets(labels, CLASSES, kind="softmax", label_smoothing=0.0)
                    logits = engine(images.to(engine.dtype))
                    loss = classification_loss(logits, targets, "softmax").mean()
                    engine.backward(loss)
                    if turn == 0:
                        engine.accumulate()
            assert math.isfinite(engine.step(loss.detach())), "AdamW has no moments before a step is applied"
            move_running_statistics(engine.module, recorded_statistics(engine.module))
    return live.peak


def main() -> None:
    path, *cases = sys.argv[1:]
    ranks = join_ranks(1, gpus=False)
    found = {}
    for case in cases:
        found[case] = peak(case, ranks)
        gc.collect()
    Path(path).write_text(json.dumps(found))
    leave_ranks()


if __name__ == "__main__":
    main()
