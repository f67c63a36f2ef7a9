"""One stage on one rank, from the recipe to the result: what every process of a run calls."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from data.remote.storage import Storage
from pipeline.checkpoints.resume import open_verified
from pipeline.checkpoints.saved import if_repeated
from pipeline.errors import BEGUN_FILE, ConfigError
from pipeline.evaluate import evaluate
from pipeline.faults.preemption import StopRequests, StopSignals
from pipeline.faults.time_limit import time_limit
from pipeline.faults.watchdog import Watchdog
from pipeline.memory_estimate import is_host_memory_full, out_of_host_memory, out_of_memory
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.output import redirect_output
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.preflight.unused_settings import Facts, unused_settings
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks, name_lost_ranks
from pipeline.ranks.rendezvous import check_world_size, read_rendezvous
from pipeline.recipe.schema import Recipe
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.run_folder import (
    classes_digest,
    final_checkpoint,
    rank_digest,
    refuse_other_data,
    relative_location,
    run_folder,
    start_digest,
)
from pipeline.runs.run_identity import establish_identity
from pipeline.runs.stage_result import StageResult
from pipeline.shard_verification import ShardVerification
from pipeline.train import train
from pipeline.training.training_run import RunContext
from pipeline.weights import build_model, load_weights, starting_weights, to_precision
from pipeline.zero.engine import autocast, model_dtype


def run_stage(
    recipe: Recipe,
    name: str,
    signals: StopSignals,
    *,
    node: str,
    started: float,
    job_end_time: Callable[[], float | None],
) -> None:
    """Run stage `name` as one rank of the process group that the environment describes; see `join_ranks`.

    Args:
        recipe: with the stage.
        name: of the stage.
        signals: of this process.
        node: name of this machine, for messages.
        started: when this start of the stage began, from which `resources.time_limit` counts; seconds since the epoch.
        job_end_time: when the scheduler ends this job, or None; called on the leader only.

    Raises:
        ConfigError, DataError: the recipe, the run folder or the data are wrong.
        RunFailed: the run cannot continue.
        Preempted: it was asked to stop and is saved.
        LostRank: another rank is gone.
    """
    found = read_rendezvous(os.environ)
    rank, world_size = found.rank, found.world_size
    folder = run_folder(recipe, name)
    signals.if_repeated = partial(if_repeated, folder)
    plan = plan_stage(recipe, name, world_size, look_at_shards=rank == 0)
    check_world_size(name, plan.stage.resources.ranks, found)
    refuse_other_data(plan)
    start = plan.stage.start_from
    done = start is not None and run_folder(recipe, start).result() is not None
    # A training stage with checkpoints of its own continues without the one that it started from.
    start_from = final_checkpoint(recipe, start) if start and (done or not isinstance(plan, TrainPlan)) else None
    folder.create(rank)
    console = redirect_output(folder, rank)
    log_file = folder.log_file(rank)
    with name_lost_ranks(), Watchdog(plan.stage.watchdog, rank, world_size, node, log_file, signals.end) as watchdog:
        ranks = join_ranks(plan.stage.resources.threads_per_rank)
        watchdog.listen()
        _refuse_different_recipes(plan, ranks)
        lock = folder.lock(node) if ranks.is_leader else None
        run_id = ""
        if ranks.is_leader:
            folder.freeze(plan, start_digest(recipe, name))
            run_id = establish_identity(folder.path).id
            folder.events.begin(ranks.world_size, node, os.getpid())
            signals.set_handler(partial(_end_recorded, signals, folder.events))
            if begun_file := os.environ.get(BEGUN_FILE):
                Path(begun_file).touch()
        run_id = ranks.broadcast_text(0, run_id)
        seconds = plan.stage.resources.time_limit_seconds
        limit = time_limit(seconds, started, job_end_time()) if ranks.is_leader else None
        grace = plan.stage.checkpoint.grace_seconds if isinstance(plan, TrainPlan) else 0.0
        requests = StopRequests(signals, grace, limit)
        training = plan if isinstance(plan, TrainPlan) else None
        unused = unused_settings(Facts(recipe, name, training))
        remarks = tuple(f"warning: {finding.what}" for finding in unused if finding.level == "warning")
        leads = console if ranks.is_leader else None
        context = RunContext(folder, ranks, leads, requests, watchdog, run_id, remarks)
        if isinstance(plan, TrainPlan):
            try:
                train(plan, context, start_from)
            except torch.OutOfMemoryError as error:
                begun = bool(folder.events.of(Event.SAVE))
                raise out_of_memory(error, plan, world_size, begun=begun) from error
            except (MemoryError, RuntimeError) as error:
                if not is_host_memory_full(error):
                    raise
                begun = bool(folder.events.of(Event.SAVE))
                raise out_of_host_memory(error, plan, begun=begun) from error
        else:
            assert start_from is not None
            _evaluate_stage(plan, context, start_from)
        ranks.barrier()
        if lock:
            lock.close()
    leave_ranks()


def _end_recorded(signals: StopSignals, events: EventLog, received: signal.Signals) -> None:
    """End this process for a signal outside the training loop, where there is nothing to save."""
    events.record(Event.STOP, reason=received.name)
    signals.exit_if_signalled()


def _refuse_different_recipes(plan: Plan, ranks: Ranks) -> None:
    """Ranks that are started by hand each read the recipe file, which may be edited meanwhile."""
    digests = ranks.gather_texts(rank_digest(plan))
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ConfigError(
                f"stage {plan.name}: rank {rank} has read another recipe, or other data, than rank 0 (digest "
                f"{digest[:16]} instead of {digests[0][:16]}); give all ranks the same recipe, data and overrides"
            )


def _evaluate_stage(plan: Plan, context: RunContext, start_from: str) -> None:
    """Evaluate the checkpoint `start_from`, without DeepSpeed. A signal ends it at once: there is nothing to save."""
    folder, ranks, stage = context.folder, context.ranks, plan.stage
    dtype = model_dtype(stage.precision)
    model = build_model(plan, ranks.device)
    storage = Storage(**stage.data.storage.model_dump())
    with closing(open_verified(start_from, ranks, storage, folder.checkpoints)) as start:
        load_weights(model, start, stage.start_weights, classes_digest(plan))
        beginning = starting_weights(plan, model, start, relative_location(start_from, folder))
    chosen, step = beginning.weights, beginning.step
    to_precision(model, dtype)
    model.eval()
    with (
        Monitor(folder, plan, step, step, ranks, context.console) as monitor,
        ShardVerification(plan, folder, ranks) as verification,
    ):
        monitor.begin(None, [])
        for line in context.remarks:
            monitor.notify(line)
        monitor.starting_weights(beginning)
        if verification.remark:
            monitor.notify(verification.remark, show=False)
        began = time.monotonic()
        with context.watchdog.section("evaluation"), autocast(stage.precision, ranks.device):
            accuracy = evaluate(model, plan, folder, ranks, dtype)
        seconds = time.monotonic() - began
        verification.wait(context.watchdog, lambda: monitor.notify("the rest of the local shards is being verified"))
        monitor.evaluation(step, accuracy)
    if ranks.is_leader:
        folder.finish(
            StageResult(
                stage=plan.name,
                steps=step,
                images_per_second=round(accuracy.samples / seconds, 1),
                checkpoint=relative_location(start_from, folder),
                weights=chosen,
                validation=accuracy.figures,
                classes=accuracy.table(plan.classes),
            )
        )
