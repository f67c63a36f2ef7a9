"""One training stage on one rank, read top to bottom: build, resume, loop, publish."""

import gc
import time
from functools import partial

import torch

from pipeline.checkpoints.claim import claim_place
from pipeline.checkpoints.locations import known_stores
from pipeline.checkpoints.manifest import NonFiniteRecord, read_manifest
from pipeline.checkpoints.resume import newest_intact
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError
from pipeline.fused_kernels import check_kernel_device
from pipeline.initial_weights.start import fitted_start
from pipeline.monitoring.monitor import Monitor
from pipeline.plan import TrainPlan, check_ranks
from pipeline.runs.announcements import started_with
from pipeline.runs.continuation import changes_since, computed_with, run_facts
from pipeline.runs.run_folder import relative_location
from pipeline.runs.stage_result import StageResult
from pipeline.runs.stage_settings import is_checkpoint_of
from pipeline.shard_verification import ShardVerification
from pipeline.training.training_run import RunContext, StartPoint, TrainingRun
from pipeline.training.training_state import TrainingState
from pipeline.weights import build_model
from pipeline.zero.engine import build_engine


def train(plan: TrainPlan, context: RunContext, start_from: str | None) -> None:
    """Train the stage from where its run folder stands to its end, evaluate, publish the result.

    A run that was stopped anywhere and continues on the same number of ranks equals the undisturbed one bit for bit.
    Where its settings were changed under way, everything is built again from the checkpoint of that step.

    Args:
        plan: of the stage.
        context: what it runs in.
        start_from: path or URL of the weights that the stage starts from: the checkpoint that an earlier stage ended
            with, if that is done, or what the recipe names.

    Raises:
        ConfigError: a checkpoint of another model or recipe, or checkpoints of which none is intact.
        DataError: shards that cannot be read or are not the indexed ones, or too many samples that cannot be used.
        RunFailed: too many steps in a row that are not finite, a last checkpoint that cannot be saved, or too many
            machines that compute wrong values.
        MachineFaulty: a machine computes wrong values, and the run can go on without it.
        StorageDown: checkpoints or remote shards, while their storage does not work.
        Preempted: it was asked to stop, and has saved if it could.
    """
    while _train_part(plan, context, start_from) < plan.steps:
        gc.collect()  # engines are in circles of references, and two of them may not fit
        if context.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def _train_part(whole: TrainPlan, context: RunContext, start_from: str | None) -> int:
    """Train to where the settings change, or to the end of the stage; returns the steps taken."""
    folder, ranks, requests = context.folder, context.ranks, context.requests

    # Build, with the weights of the run's own newest checkpoint, else of the earlier stage, else the initial ones.
    store = checkpoint_store(folder, whole.stage)
    stores, passed_over = [store], list[str]()
    if ranks.is_leader:
        claim_place(store, folder)
        stores = known_stores(folder, store, passed_over.append)
    checkpoint, damaged = newest_intact(stores, ranks)
    plan = whole.at(checkpoint.step if checkpoint else 0)
    if checkpoint and not is_checkpoint_of(whole, checkpoint.manifest.facts):
        raise ConfigError(
            f"{checkpoint.location}: a checkpoint of another recipe or of other data; give the recipe another name, or "
            "move this checkpoint elsewhere"
        )
    stage, now = plan.stage, computed_with(plan, ranks)
    check_ranks(stage, ranks.world_size, f"stage {plan.name}: ")
    check_kernel_device(stage, on_gpu=ranks.device.type == "cuda", where=f"stage {plan.name}: ")
    facts = run_facts(plan, context.run_id, now)
    model = build_model(plan, ranks.device)
    weights, beginning = None, None
    if stage.start_from and not checkpoint:
        if start_from is None:
            raise ConfigError(
                f"stage {stage.start_from} is not done, and {plan.name} has no checkpoint yet; run it first"
            )
        fitted = fitted_start(plan, start_from, folder, model, ranks, store.scratch)
        fitted.fill_buffers(model)
        weights, beginning = fitted.parameters, fitted.beginning
    state = TrainingState(build_engine(model, stage, ranks), ranks, stage.ema_decay)

    # Resume.
    start = StartPoint(step=0, skipped=0, non_finite=NonFiniteRecord(), checkpoint=None)
    if checkpoint:
        state.load(checkpoint)
        checkpoint.close()
        requests.saved(checkpoint.name)
        # A stage ends with a checkpoint in the place that its recipe names, from which later stages start.
        elsewhere = checkpoint.step == plan.steps and ranks.broadcast(
            ranks.is_leader and plan.steps not in store.contents().steps
        )
        saved = checkpoint.manifest.facts
        start = StartPoint(saved.step, saved.skipped_samples, saved.non_finite, checkpoint.name, bool(elsewhere))
    elif weights is not None:
        state.set_weights(weights)

    # Loop.
    with (
        Monitor(folder, plan, start.step, plan.steps, ranks, context.console) as monitor,
        Saver(
            store,
            folder,
            stage.checkpoint,
            ranks,
            newest=start.checkpoint,
            # Ranks that wait for the one with the error must not be taken for hanging meanwhile.
            error_patience=stage.watchdog.least_seconds / 2,
            section=partial(context.watchdog.section, "save"),
            on_published=requests.saved,
        ) as saver,
        ShardVerification(whole, folder, ranks) as verification,
        TrainingRun(plan, context, state, monitor, saver, verification, start, facts) as run,
        requests,
    ):
        monitor.begin(start.checkpoint, damaged, now)
        for line in (*context.remarks, *passed_over):
            monitor.notify(line)
        if beginning:
            monitor.starting_weights(beginning)
        if checkpoint:
            monitor.changes(changes_since(checkpoint.manifest.facts, now, ranks.world_size))
        if verification.remark:
            monitor.notify(verification.remark, show=False)
        run.evaluate_if_missed()
        began = time.monotonic()
        while not run.is_done:
            result = run.take_step()
            if run.is_due(stage.log.every_steps) or run.step == 1 or run.is_done:
                run.report_step(result)
            if result.message.histograms:
                run.report_histograms()
            if run.first_bad_step is not None:
                run.roll_back(run.first_bad_step)
            run.save_if_due()
            if result.message.stop_reason:
                run.stop(result.message.stop_reason)
            if run.is_due(stage.evaluation.every_steps) and not run.is_done:
                run.evaluate()
            run.report_saves()
        seconds = time.monotonic() - began
        run.save_and_wait()
        if plan.until < whole.steps:
            return plan.until
        accuracy = run.evaluate()
        run.finish_verification()

    # Publish.
    if ranks.is_leader:
        read_manifest(store.at(plan.steps), store.storage)  # is still there after what may have been a long evaluation
        images = plan.samples_after(plan.steps) - plan.samples_after(start.step)
        folder.finish(
            StageResult(
                stage=plan.name,
                steps=plan.steps,
                samples=plan.samples_after(plan.steps),
                images_per_second=round(images / seconds, 1) if images else None,
                checkpoint=relative_location(store.at(plan.steps), folder),
                starting_weights=started_with(folder.events),
                weights="ema" if run.evaluates_average else "raw",
                validation=accuracy.figures,
                classes=accuracy.table(plan.classes),
                deterministic=stage.deterministic if ranks.device.type == "cuda" else None,
            )
        )
    return plan.steps
