"""One rank: `python observation_worker.py RECIPE FOLDER CASE...`. A step by the engine, and its micro-batches observed.

A case is a precision, then -recomputed for activation checkpointing, -fused for fused convolutions. FOLDER/CASE.json
has the losses of the engine's micro-batches, and those that were observed, as they are written exactly.
"""

import json
import sys
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pipeline import plan as plan_module
from pipeline.faults.preemption import REASONS
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import join_ranks, leave_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.replay.observation import ObservedModel
from pipeline.training.step import StepContext, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_batches import open_stream
from pipeline.weights import build_model, persistent_buffers
from pipeline.zero.engine import build_engine
from tests.support.training import end_here

STEP = 3


def main(recipe: Path, folder: Path, cases: list[str]) -> None:
    ranks = join_ranks(1)
    # The fused convolution in plain torch, which stages on CPUs are not given.
    assert hasattr(plan_module, "check_fused_depthwise")
    plan_module.check_fused_depthwise = lambda *_, **__: None
    for case in cases:
        changes = [f"precision={case.split('-')[0]}", "pretrain.zero_stage=1"]
        changes += ["activation_checkpointing=every_block"] if "recomputed" in case else []
        changes += ["fused_depthwise=true"] if "fused" in case else []
        plan = plan_stage(load_recipe(recipe, changes), "pretrain", 1)
        assert isinstance(plan, TrainPlan)
        trained = build_model(replace(plan, seed=plan.seed + 1))  # other weights than the plan's initial ones
        weights = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
        observed = ObservedModel(plan, ranks.device)
        observed.load(weights, persistent_buffers(trained))
        engine = build_engine(trained, plan.stage, ranks)
        watchdog = Watchdog(plan.stage.watchdog, 0, 1, "node", folder / "log", end_here)
        context = StepContext(engine, plan, ranks, StepClock(ranks.device), watchdog)
        message = StepMessage([0.0] * len(REASONS), 0.0, [0.0, 0.0])
        with closing(open_stream(plan, 0, 1, STEP)) as stream:
            batches = list(islice(stream, plan.stage.batch.micro_batches))
        result = take_step(context, iter(batches), STEP, message)
        found = [observed.observe(batch, STEP, number).loss for number, batch in enumerate(batches)]
        erased = sum(len(batch.erased) for batch in batches)
        report = {"engine": result.losses.tolist(), "observed": found, "erased": erased}
        (folder / f"{case}.json").write_text(json.dumps(report))
    leave_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
