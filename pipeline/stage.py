"""One stage on one rank, from the recipe to the result: what every process of a run calls."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from pipeline.checkpoints.saved import if_repeated
from pipeline.errors import BEGUN_FILE, ConfigError
from pipeline.evaluate import evaluate
from pipeline.faults.preemption import StopRequests, StopSignals
from pipeline.faults.time_limit import time_limit
from pipeline.faults.watchdog import Watchdog
from pipeline.initial_weights.start import fitted_start
from pipeline.memory_estimate import is_host_memory_full, out_of_host_memory, out_of_memory
from pipeline.monitoring.console import styled_text
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.output import redirect_output
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.precision import autocast, model_dtype
from pipeline.preflight.stage_facts import Facts
from pipeline.preflight.unused_settings import unused_settings
from pipeline.ranks.device_settings import prepare_devices
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks, name_lost_ranks
from pipeline.ranks.rendezvous import check_world_size, read_rendezvous
from pipeline.recipe.schema import Recipe
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.run_folder import final_checkpoint, run_folder, start_digest
from pipeline.runs.run_identity import establish_identity
from pipeline.runs.stage_result import StageResult
from pipeline.runs.stage_settings import rank_digest, refuse_other_data
from pipeline.shard_verification import ShardVerification
from pipeline.train import train
from pipeline.training.training_run import RunContext
from pipeline.weights import build_model, to_precision


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
        MachineFaulty: a rank computes wrong values.
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
    start = plan.stage.start_stage
    start_from = plan.stage.start_source
    # A training stage with checkpoints of its own continues without the one that it started from.
    if start and (run_folder(recipe, start).result() is not None or not isinstance(plan, TrainPlan)):
        start_from = final_checkpoint(recipe, start)
    folder.create(rank)
    console = redirect_output(folder, rank)
    log_file = folder.log_file(rank)
    with name_lost_ranks(), Watchdog(plan.stage.watchdog, rank, world_size, node, log_file, signals.end) as watchdog:
        resources = plan.stage.resources
        prepare_devices(gpus=resources.gpus_per_rank > 0, deterministic=plan.stage.deterministic)
        ranks = join_ranks(resources.threads_per_rank, gpus=resources.gpus_per_rank > 0)
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
        leads = console if ranks.is_leader else None
        requests = StopRequests(
            signals,
            grace,
            limit,
            on_request=partial(_say_request, leads, name),
            on_second=partial(_record_interrupt, folder.events) if ranks.is_leader else _do_nothing,
        )
        training = plan if isinstance(plan, TrainPlan) else None
        unused = unused_settings(Facts(recipe, name, training))
        remarks = tuple(f"warning: {finding.what}" for finding in unused if finding.level == "warning")
        context = RunContext(folder, ranks, leads, requests, watchdog, run_id, remarks, node)
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


def _say_request(console: Console | None, stage: str, reason: str) -> None:
    """Show that a signal to stop has arrived: a step may take long, and a second signal would lose it."""
    if console:
        line = f"  {reason}: saves after the current step and ends; a second signal ends it at once, without that"
        console.print(styled_text((stage, "bold"), line), soft_wrap=True)


def _record_interrupt(events: EventLog, reason: str) -> None:
    """Record a stop without a save, so that this start does not count as one that made no progress by itself."""
    events.record(Event.STOP, reason=reason, at_once=True)


def _do_nothing(reason: str) -> None:
    pass


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
    """Evaluate the model at `start_from`, without DeepSpeed. A signal ends it at once: there is nothing to save."""
    folder, ranks, stage = context.folder, context.ranks, plan.stage
    dtype = model_dtype(stage.precision)
    model = build_model(plan, ranks.device)
    fitted = fitted_start(plan, start_from, folder, model, ranks, folder.checkpoints)
    fitted.fill(model)
    beginning = fitted.beginning
    chosen, step = beginning.weights, beginning.step or 0
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
                checkpoint=beginning.checkpoint,
                starting_weights=beginning.facts(plan),
                weights=chosen,
                validation=accuracy.figures,
                classes=accuracy.table(plan.classes),
                deterministic=stage.deterministic if ranks.device.type == "cuda" else None,
            )
        )
