"""One stage on one rank, from the recipe to the result: what every process of a run calls."""

import os
import time

from rich.console import Console

from data.storage import Storage
from pipeline.checkpoints.resume import open_whole
from pipeline.distributed import Ranks, join_ranks, leave_ranks, rank_and_world_size
from pipeline.engine import model_dtype
from pipeline.evaluate import evaluate
from pipeline.monitor import Monitor, divert_output
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.recipe import Recipe
from pipeline.run_folder import RunFolder, final_checkpoint, relative_location, run_folder, start_digest
from pipeline.stopping import StopRequests, StopSignals
from pipeline.time_limit import time_limit
from pipeline.train import train
from pipeline.watchdog import Watchdog
from pipeline.weights import build_model, load_weights, to_precision


def run_stage(recipe: Recipe, name: str, signals: StopSignals) -> None:
    """Run stage `name` as one rank of the process group that the environment describes; see `join_ranks`.

    Raises:
        ConfigError, DataError: the recipe, the run folder or the data are wrong.
        RunFailed: the run cannot go on.
        Preempted: it was asked to stop and is saved.
    """
    rank, world_size = rank_and_world_size()
    folder = run_folder(recipe, name)
    plan = plan_stage(recipe, name, world_size, look_at_shards=rank == 0)
    start = plan.stage.start_from
    start_from = final_checkpoint(recipe, start) if start else None
    folder.create()
    console = divert_output(folder, rank)
    log_file = folder.log_file(rank)
    with Watchdog(plan.stage.watchdog, rank, world_size, log_file, signals.end) as watchdog:
        ranks = join_ranks(plan.stage.resources.threads_per_rank)
        watchdog.joined()
        lock = folder.lock() if ranks.leads else None
        if ranks.leads:
            folder.freeze(plan, start_digest(recipe, name))
            folder.diary.begin(ranks.world_size)
        ranks.barrier()
        shown = console if ranks.leads else None
        if isinstance(plan, TrainPlan):
            seconds = plan.stage.resources.time_limit_seconds
            limit = time_limit(seconds, signals.started, os.environ) if ranks.leads else None
            requests = StopRequests(signals, plan.stage.checkpoint.grace_seconds, limit)
            train(plan, folder, start_from, ranks, shown, requests, watchdog)
        else:
            assert start_from is not None
            with watchdog.section("evaluation"):
                _evaluate_stage(plan, folder, start_from, ranks, shown)
        ranks.barrier()
        if lock:
            lock.release()
    leave_ranks()


def _evaluate_stage(plan: Plan, folder: RunFolder, start_from: str, ranks: Ranks, console: Console | None) -> None:
    """Evaluate the checkpoint `start_from`; needs no DeepSpeed."""
    dtype = model_dtype(plan.stage.precision)
    storage = Storage(**plan.stage.data.storage.model_dump())
    checkpoint = open_whole(start_from, ranks, storage, folder.checkpoints)
    model = build_model(plan, ranks.device)
    load_weights(model, checkpoint)
    checkpoint.close()
    to_precision(model, dtype)
    model.eval()
    with Monitor(folder, plan.name, checkpoint.step, checkpoint.step, 0, console) as monitor:
        monitor.begin(None, [], ranks.world_size)
        began = time.monotonic()
        accuracy = evaluate(model, plan, folder, ranks, dtype)
        seconds = time.monotonic() - began
        monitor.evaluation(checkpoint.step, accuracy)
    if ranks.leads:
        folder.finish(
            {
                "stage": plan.name,
                "steps": checkpoint.step,
                "images_per_second": round(accuracy.samples / seconds, 1),
                "checkpoint": relative_location(start_from, folder),
                "validation": accuracy.as_dict(),
                "classes": accuracy.table(plan.classes),
            }
        )
