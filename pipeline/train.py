"""One training stage on one rank, read top to bottom: build, resume, loop, publish."""

import time
from contextlib import ExitStack, closing

from pipeline.checkpoints.resume import newest_whole, open_whole
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import checkpoint_store, known_stores
from pipeline.errors import ConfigError
from pipeline.faults.non_finite import NonFiniteSteps
from pipeline.faults.preemption import REASONS, agreed_reason
from pipeline.images import grid, viewable
from pipeline.monitoring.histograms import weight_histograms
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.norms import AdamWStep, weight_and_update_norms
from pipeline.monitoring.sample_log import SampleLog
from pipeline.plan import TrainPlan
from pipeline.run_folder import classes_digest, digests, relative_location
from pipeline.step import take_step
from pipeline.training_batches import read_micro_batches
from pipeline.training_run import RunContext, TrainingRun
from pipeline.training_state import TrainingState
from pipeline.weights import build_model, fitted_weights, model_arguments
from pipeline.zero.engine import build_engine, set_learning_rate
from pipeline.zero.fragments import optimizer_steps
from pipeline.zero.optimizer import layer_numbers, rate_scales


def train(plan: TrainPlan, context: RunContext, start_from: str | None) -> None:
    """Train the stage from where its folder has it to its end, evaluate, publish the result.

    A run that was stopped anywhere and continues on the same number of ranks equals the undisturbed one bit for bit.

    Raises:
        ConfigError: a checkpoint of another model or recipe, or none that is whole.
        DataError: shards that cannot be read, or too many samples that cannot be used.
        RunFailed: too many steps in a row that are not finite, or a last checkpoint that cannot be saved.
        Preempted: it was asked to stop and is saved.
    """
    stage, folder, ranks = plan.stage, context.folder, context.ranks
    requests, watchdog = context.requests, context.watchdog

    facts = {"stage": plan.name, "precision": stage.precision, "model": model_arguments(plan), **digests(plan)}

    # Weights: the run's own newest whole checkpoint, else the earlier stage's, else the initialization.
    place = checkpoint_store(folder, stage)
    checkpoint, damaged = newest_whole(known_stores(folder, place), ranks)
    if checkpoint and any(checkpoint.manifest[key] != value for key, value in digests(plan).items()):
        raise ConfigError(f"{checkpoint.location}: a checkpoint of another recipe or of other data; remove it")
    model = build_model(plan, ranks.device)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    undecayed, scales = model.no_weight_decay(), rate_scales(layer_numbers(model), stage.optimizer.layer_decay)
    weights = None
    if start_from and not checkpoint:
        with closing(open_whole(start_from, ranks, place.storage, place.scratch)) as start:
            weights = fitted_weights(model, start, stage.start_weights, classes_digest(plan))
    engine = build_engine(model, stage, ranks)
    state = TrainingState(engine, shapes, ranks, stage.ema_decay)
    if checkpoint is not None:
        state.load(checkpoint)
        checkpoint.close()
        requests.saved(checkpoint.name)
    elif weights is not None:
        state.set_weights(weights)
    resumed, skipped = (checkpoint.step, checkpoint.manifest["skipped_samples"]) if checkpoint else (None, 0)
    first_step = resumed or 0

    with (
        Monitor(folder, plan, first_step, plan.steps, ranks, context.console) as monitor,
        Saver(place, folder, stage.checkpoint, ranks, published=requests.saved) as saver,
        ExitStack() as readers,
        requests,
    ):
        session = TrainingRun(plan, context, engine, state, monitor, saver, facts, first_step, skipped, resumed)
        monitor.begin(checkpoint.name if checkpoint else None, damaged)
        session.evaluate_if_missed()
        reader = readers.enter_context(closing(read_micro_batches(plan, folder, ranks, first_step)))
        not_finite = NonFiniteSteps(plan, folder, ranks)
        sample_log = SampleLog(folder, plan, ranks) if stage.log.samples else None
        save_is_due = False
        began = time.monotonic()
        while not session.ended:
            with watchdog.section("step"):
                step_began = time.monotonic()
                rate = plan.learning_rate(session.step)
                set_learning_rate(engine, rate)
                times = monitor.clock.contribution(ranks.rank, ranks.world_size)
                notes = [*requests.flags, float(monitor.histograms_due(session.step + 1)), *times]
                result = take_step(engine, plan, reader, session.step, ranks, notes, monitor.clock, watchdog)
                stop = agreed_reason(result.notes[: len(REASONS)])
                histograms_wanted, *times_of_ranks = result.notes[len(REASONS) :]
                if result.applied:
                    state.update_average()
                    if sample_log:
                        sample_log.write(session.step, result.batches)
                if session.step == 0:
                    monitor.images(grid(viewable(result.pictures)))
                first_bad = not_finite.count(session.step, result)
                session.step += 1
                session.skipped += result.skipped
                monitor.clock.step_done()
                monitor.add_rank_times(times_of_ranks)
                requests.margin.step_took(time.monotonic() - step_began)

            if session.due(stage.log.every_steps) or session.step == 1 or session.ended:
                with monitor.paused():
                    last_step = AdamWStep(stage.optimizer, rate, optimizer_steps(engine), undecayed, scales)
                    norms = weight_and_update_norms(state.fragments, stage.model.variant, last_step, ranks)
                scalars = {
                    "train/loss": result.loss,
                    "train/learning_rate": rate,
                    "train/gradient_norm": result.gradient_norm,
                    "train/skipped_samples": session.skipped,
                    "train/steps_not_applied": not_finite.total,
                }
                monitor.step(session.step, {**scalars, **norms})
            if histograms_wanted:
                with monitor.paused():
                    monitor.histograms(session.step, weight_histograms(state.fragments, list(shapes), ranks))

            if first_bad is not None:
                session.roll_back(first_bad)
                reader.close()
                reader = readers.enter_context(closing(read_micro_batches(plan, folder, ranks, session.step)))
                not_finite.reset()
            # A row of steps that are not finite is not saved: weights from before it are what a roll-back needs.
            save_is_due = save_is_due or session.due(stage.checkpoint.every_steps)
            if session.ended or (save_is_due and not not_finite.in_a_row):
                session.save()
                save_is_due = False
            if stop:
                session.stop(stop)
            if session.due(stage.evaluation.every_steps) and not session.ended:
                session.evaluate()
            session.tell_of_saves()
        seconds = time.monotonic() - began
        session.save_whole()
        accuracy = session.evaluate()
    if ranks.leads:
        images = (plan.steps - first_step) * stage.batch.global_size
        folder.finish(
            {
                "stage": plan.name,
                "steps": plan.steps,
                "samples": plan.steps * stage.batch.global_size,
                "images_per_second": round(images / seconds, 1) if images else None,
                "checkpoint": relative_location(place.at(plan.steps), folder),
                "weights": "ema" if session.evaluates_average else "raw",
                "validation": accuracy.as_dict(),
                "classes": accuracy.table(plan.classes),
            }
        )
