"""One training stage on one rank, read top to bottom: build, resume, loop, publish."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data.stream import MicroBatch
from models.norm import move_running_statistics, recorded_statistics
from pipeline.checkpoints.manifest import step_name
from pipeline.checkpoints.place import checkpoint_place, known_places
from pipeline.checkpoints.resume import newest_whole, open_whole
from pipeline.checkpoints.saver import Saver
from pipeline.distributed import Ranks
from pipeline.engine import build_engine, model_dtype, optimizer_step, set_learning_rate
from pipeline.errors import ConfigError, Preempted, RunFailed
from pipeline.evaluate import Accuracy, evaluate
from pipeline.images import grid, normalized, viewable
from pipeline.loss import class_targets, classification_loss
from pipeline.mixup import mixed, mixing_weight
from pipeline.monitor import Monitor
from pipeline.plan import TrainPlan
from pipeline.reader import read_micro_batches
from pipeline.run_folder import RunFolder, digests, relative_location
from pipeline.state import TrainingState
from pipeline.stopping import REASONS, StopRequests, agreed_reason
from pipeline.watchdog import Watchdog
from pipeline.weights import build_model, fitted_weights

_STOCHASTIC_DEPTH = 4  # keeps these draws apart from those in data/


def train(
    plan: TrainPlan,
    folder: RunFolder,
    start_from: str | None,
    ranks: Ranks,
    console: Console | None,
    requests: StopRequests,
    watchdog: Watchdog,
) -> None:
    """Train the stage from where `folder` has it to its end, evaluate, publish the result; the leader has a `console`.

    A run that was stopped anywhere and continues on the same number of ranks equals the undisturbed one bit for bit.

    Raises:
        ConfigError: a checkpoint of another model or recipe, or none that is whole.
        DataError: shards that cannot be read, or too many samples that cannot be used.
        RunFailed: a loss that is not finite.
        Preempted: it was asked to stop and is saved.
    """
    stage = plan.stage

    # Weights: the run's own newest whole checkpoint, else the earlier stage's, else the initialization.
    place = checkpoint_place(folder, stage)
    checkpoint, damaged = newest_whole(known_places(folder, place), ranks)
    if checkpoint and any(checkpoint.manifest[key] != value for key, value in digests(plan).items()):
        raise ConfigError(f"{checkpoint.location}: a checkpoint of another recipe or of other data; remove it")
    model = build_model(plan, ranks.device)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = None
    if start_from and not checkpoint:
        start = open_whole(start_from, ranks, place.storage, place.scratch)
        weights = fitted_weights(model, start)
        start.close()
    engine = build_engine(model, stage, ranks)
    state = TrainingState(engine, shapes, ranks)
    if checkpoint is not None:
        state.load(checkpoint)
        checkpoint.close()
    elif weights is not None:
        state.set_weights(weights)
    first_step = checkpoint.step if checkpoint else 0
    skipped = checkpoint.manifest["skipped_samples"] if checkpoint else 0

    facts = {"stage": plan.name, "precision": stage.precision, **digests(plan)}
    with (
        Monitor(folder, plan.name, first_step, plan.steps, stage.batch.global_size, console) as monitor,
        closing(read_micro_batches(plan, folder, ranks, first_step)) as reader,
        Saver(place, folder, stage.checkpoint, ranks) as saver,
    ):
        monitor.begin(checkpoint.name if checkpoint else None, damaged, ranks.world_size)
        if checkpoint:
            requests.saved(checkpoint.name)
        began = time.monotonic()
        with requests:
            for step in range(first_step, plan.steps):
                with watchdog.section("step"):
                    step_began = time.monotonic()
                    rate = plan.learning_rate(step)
                    set_learning_rate(engine, rate)
                    loss, norm, skipped_now, stop = _step(
                        engine, plan, reader, step, ranks, monitor, requests, watchdog
                    )
                    skipped += skipped_now
                    done, last = step + 1, step + 1 == plan.steps
                    if done % stage.log.every_steps == 0 or done == 1 or last:
                        scalars = {"train/loss": loss, "train/learning_rate": rate, "train/gradient_norm": norm}
                        monitor.step(done, {**scalars, "train/skipped_samples": skipped})
                    requests.margin.step_took(time.monotonic() - step_began)
                if done % stage.checkpoint.every_steps == 0 or last or stop:
                    with monitor.aside(), watchdog.section("save"):
                        monitor.flush()
                        samples = done * stage.batch.global_size
                        saver.save(state.live({**facts, "step": done, "samples": samples, "skipped_samples": skipped}))
                    if stop:
                        with watchdog.section("save"):
                            saver.finish()
                        if ranks.leads:
                            folder.diary.note("stop", reason=stop, step=done, checkpoint=step_name(done))
                        raise Preempted(stop, done, step_name(done))
                if stage.evaluation.every_steps and done % stage.evaluation.every_steps == 0 and not last:
                    with monitor.aside(), watchdog.section("evaluation"):
                        monitor.evaluation(done, _evaluate(engine, plan, folder, ranks))
                reports = saver.reports()
                monitor.saved(reports)
                for report in reports:
                    if report.failure is None:
                        requests.saved(report.checkpoint)
                        requests.margin.save_took(report.seconds)
        with monitor.aside(), watchdog.section("save"):
            saver.finish_whole()
            monitor.saved(saver.reports())
        seconds = time.monotonic() - began
        with watchdog.section("evaluation"):
            accuracy = _evaluate(engine, plan, folder, ranks)
        monitor.evaluation(plan.steps, accuracy)
    if ranks.leads:
        images = (plan.steps - first_step) * stage.batch.global_size
        folder.finish(
            {
                "stage": plan.name,
                "steps": plan.steps,
                "samples": plan.steps * stage.batch.global_size,
                "images_per_second": round(images / seconds, 1) if images else None,
                "checkpoint": relative_location(place.at(plan.steps), folder),
                "validation": accuracy.as_dict(),
                "classes": accuracy.table(plan.classes),
            }
        )


def _step(
    engine: Any,
    plan: TrainPlan,
    reader: Iterator[MicroBatch],
    step: int,
    ranks: Ranks,
    monitor: Monitor,
    requests: StopRequests,
    watchdog: Watchdog,
) -> tuple[float, float, int, str | None]:
    """One optimizer step: its loss, the mean over the global batch, its gradient norm before clipping, how many
    samples had to be replaced, and why the run is to stop after it, if any rank was asked to.
    """
    stage = plan.stage
    rounds = stage.batch.micro_batches // ranks.world_size
    loss_sum, skipped = torch.zeros(1, device=ranks.device), 0
    for turn, number in enumerate(range(ranks.rank * rounds, (ranks.rank + 1) * rounds)):
        watchdog.at("reading", step, turn)
        batch = next(reader)
        watchdog.at("computing", step, turn)
        skipped += len(batch.skipped)
        images = normalized(batch.images, ranks.device, torch.float32)
        labels = torch.from_numpy(batch.labels).to(ranks.device, non_blocking=True)
        kind, smoothing = stage.loss.kind, stage.loss.label_smoothing
        targets = class_targets(labels, len(plan.classes), kind=kind, label_smoothing=smoothing)
        if stage.mixup_alpha:
            weight = mixing_weight(stage.mixup_alpha, seed=plan.seed, step=step, number=number)
            images, targets = mixed(images, weight), mixed(targets, weight)
        if step == 0 and number == 0:
            monitor.pictures(grid(viewable(images)))
        # What is dropped follows from the micro-batch's place in the run, not from where it is computed.
        seed = np.random.SeedSequence([plan.seed, _STOCHASTIC_DEPTH, step, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        logits = engine(images.to(model_dtype(stage.precision)))
        loss = classification_loss(logits, targets, kind).mean()
        engine.backward(loss)
        loss_sum += loss.detach()
        if number + 1 < (ranks.rank + 1) * rounds:
            engine.step()  # only counts: DeepSpeed applies the gradient with the last micro-batch

    # One exchange for all that is summed over the ranks.
    watchdog.at("exchanging", step, rounds - 1)
    told = loss_sum.new_tensor([skipped, *requests.flags])
    sums = ranks.sum(torch.cat([loss_sum, told, recorded_statistics(engine.module)]))
    means = sums / stage.batch.micro_batches
    loss_mean = float(means[0])
    _refuse_not_finite(loss_mean, "loss", step)
    statistics = 2 + len(REASONS)
    move_running_statistics(engine.module, means[statistics:])
    norm = optimizer_step(engine)
    _refuse_not_finite(norm, "gradient norm", step)
    return loss_mean, norm, round(float(sums[1])), agreed_reason(sums[2:statistics].tolist())


def _refuse_not_finite(value: float, name: str, step: int) -> None:
    if not np.isfinite(value):
        raise RunFailed(
            f"the {name} of step {step + 1} is {value}; the last checkpoint is from before it. "
            "Lower optimizer.peak_learning_rate or lengthen the warm-up"
        )


def _evaluate(engine: Any, plan: TrainPlan, folder: RunFolder, ranks: Ranks) -> Accuracy:
    engine.eval()
    accuracy = evaluate(engine, plan, folder, ranks, model_dtype(plan.stage.precision))
    engine.train()
    return accuracy
