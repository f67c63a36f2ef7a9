"""Steps of a stage taken again on this rank, by the code that takes them in training."""

import gc
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.remote.storage import Storage
from data.stream import MicroBatch
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import NonFiniteRecord, RollBack
from pipeline.checkpoints.resume import open_verified
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore
from pipeline.faults.preemption import REASONS
from pipeline.faults.watchdog import Watchdog
from pipeline.initial_weights.start import fitted_start
from pipeline.monitoring.norms import AdamWStep, block_index, block_names, norms_by_part, squared_norms_by_part
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.replay.run_checkpoint import run_checkpoint
from pipeline.replay.start_points import ReplayStart
from pipeline.runs.continuation import computed_with, run_facts
from pipeline.runs.run_folder import RunFolder
from pipeline.training.step import StepContext, StepResult, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_batches import open_stream
from pipeline.training.training_state import TrainingState
from pipeline.weights import build_model, persistent_buffers
from pipeline.zero.engine import build_engine

_KEPT = 2  # checkpoints of a branch: where it begins, and where it stands


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step that was taken again; equal on all ranks but for `result.batches`."""

    step: int
    """Its number, from 1."""
    result: StepResult
    learning_rate: float
    gradient_norms: dict[str, float]
    """By block, of the averaged gradient before clipping."""
    update_norms: dict[str, float]
    """By block, of what AdamW took off the weights; empty if the step was not applied."""
    weight_norms: dict[str, float]
    """By block, after the step."""
    skipped: tuple[str, ...]
    """The samples of all ranks that were replaced, with the reasons."""
    seconds: float


class StepReplay:
    """A stage under way again; all ranks call its methods in the same order.

    Args:
        plan: of the whole stage.
        folder: the run folder, for the place of the weights that it began with.
        ranks: all of them.
        watchdog: of this rank.
        scratch: folder for a checkpoint where the settings change, and for downloads; the same on all ranks.
        starting_weights: see `RecordedStage.starting_weights`.
    """

    def __init__(
        self,
        plan: TrainPlan,
        folder: RunFolder,
        ranks: Ranks,
        watchdog: Watchdog,
        scratch: Path,
        starting_weights: Callable[[], str | None],
    ) -> None:
        self._folder, self._ranks, self._watchdog = folder, ranks, watchdog
        self._scratch, self._starting_weights = scratch, starting_weights
        self._state: TrainingState | None = None
        self._reader: Generator[MicroBatch] | None = None
        self._skipped, self._non_finite = 0, NonFiniteRecord()
        self.step = 0
        """Steps taken."""
        self.whole = plan
        """Of the whole stage."""
        self.plan = plan
        """Of the next step."""

    @property
    def state(self) -> TrainingState:
        """Weights, moments and statistics after `step` steps."""
        assert self._state is not None
        return self._state

    def begin(self, start: ReplayStart) -> None:
        """Take the state of `start`.

        Raises:
            ConfigError: its checkpoint is damaged, or of another recipe or other data.
            StorageDown, StorageRefused: a remote store that cannot be read.
        """
        if start.location is None:
            self._build(self.whole.at(0), 0)
            return
        with run_checkpoint(start.location, self.whole, self._ranks, self._scratch) as checkpoint:
            self._build(self.whole.at(start.step), start.step, checkpoint)
            facts = checkpoint.manifest.facts
            self._skipped, self._non_finite = facts.skipped_samples, facts.non_finite
            if start.saved_at != start.step:
                roll_backs = (*facts.non_finite.roll_backs, RollBack(start.saved_at, start.step))
                self._non_finite = replace(facts.non_finite, not_applied_in_a_row=0, roll_backs=roll_backs)

    def take_step(self) -> ReplayedStep:
        """Take the next step.

        Raises:
            DataError, StorageDown: as for `open_stream`.
        """
        engine, plan, ranks = self.state.engine, self.plan, self._ranks
        if self._reader is None:
            self._reader = open_stream(plan, ranks.rank, ranks.world_size, self.step, ranks.device)
        variant = plan.stage.model.variant
        names, index = block_names(variant), block_index(variant)
        norms, numbers = list[Tensor](), list[int]()

        def see(parameter: str, gradient: Tensor) -> None:
            norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float64))
            numbers.append(index(parameter))

        began, rate, clock = time.monotonic(), plan.learning_rate(self.step), StepClock(ranks.device)
        engine.set_learning_rate(rate)
        message = StepMessage([0.0] * len(REASONS), 0.0, clock.contribution(ranks.rank, ranks.world_size))
        context = StepContext(engine, plan, ranks, clock, self._watchdog, on_gradient=see)
        with self._watchdog.section("step"):
            result = take_step(context, self._reader, self.step, message)
            if result.applied:
                self.state.update_average()
            gradients = ranks.sum(squared_norms_by_part(norms, numbers, len(names), ranks.device)).sqrt().tolist()
            parameters = engine.parameters
            last = AdamWStep(
                plan.stage.optimizer, rate, engine.optimizer_steps, parameters.undecayed, parameters.rate_scales
            )
            weights, updates = norms_by_part(self.state.fragments, len(names), index, last, ranks)
        self.step += 1
        self._skipped += result.skipped
        if not result.applied:
            total, in_a_row = self._non_finite.steps_not_applied + 1, self._non_finite.not_applied_in_a_row + 1
            self._non_finite = replace(self._non_finite, steps_not_applied=total, not_applied_in_a_row=in_a_row)
        elif self._non_finite.not_applied_in_a_row:
            self._non_finite = replace(self._non_finite, not_applied_in_a_row=0)
        return ReplayedStep(
            step=self.step,
            result=result,
            learning_rate=rate,
            gradient_norms=dict(zip(names, gradients, strict=True)),
            update_norms=dict(zip(names, updates, strict=True)) if result.applied else {},
            weight_norms=dict(zip(names, weights, strict=True)),
            skipped=skipped_samples(result.batches, ranks),
            seconds=time.monotonic() - began,
        )

    def change_settings_if_due(self) -> None:
        """Before a step: if the run took it with other settings than the one before, go on with these."""
        if self.step == self.plan.until < self.whole.steps:
            self.continue_with(self.whole)

    def continue_with(self, plan: TrainPlan) -> None:
        """Go on from here with the settings of `plan`, the plan of a whole stage.

        The state goes through a checkpoint in the scratch folder, as it does where a run changes its settings.
        """
        store = CheckpointStore(str(self._scratch / "checkpoints"), Storage(), self._scratch)
        self.save(store, RunFolder(self._scratch), None)
        checkpoint = open_verified(store.at(self.step), self._ranks)
        self.whole = plan
        self._build(plan.at(self.step), self.step, checkpoint)
        self._ranks.barrier()
        if self._ranks.is_leader:
            store.remove(self.step)

    def live(self, run_id: str | None = None) -> LiveState:
        """The state as a checkpoint of run `run_id` would have it."""
        facts = run_facts(self.plan, run_id, computed_with(self.plan, self._ranks))
        samples = self.plan.samples_after(self.step)
        counted = self._skipped, self._non_finite
        return self.state.live(facts, self.step, samples, *counted, classes=self.plan.classes)

    def save(self, store: CheckpointStore, folder: RunFolder, run_id: str | None) -> None:
        """Save the state as a checkpoint of run `run_id`, whose event log in `folder` gets the entry.

        Raises:
            RunFailed, StorageDown: it cannot be saved.
        """
        live = self.live(run_id)
        with (
            self._watchdog.section("save"),
            Saver(store, folder, CheckpointSettings(keep_last=_KEPT), self._ranks) as saver,
        ):
            saver.save(live)
            saver.finish_or_retry()

    def weights(self) -> dict[str, Tensor]:
        """The whole float32 weights, on this rank's device; all ranks call this."""
        whole = {
            name: torch.zeros(shape, device=self._ranks.device).flatten()
            for name, shape in self.state.engine.parameters.shapes.items()
        }
        for fragment in self.state.fragments:
            if fragment.saved_here:
                whole[fragment.parameter][fragment.start : fragment.stop] = fragment.tensors["master"].detach()
        shapes = self.state.engine.parameters.shapes
        return {name: self._ranks.sum(flat).view(shapes[name]) for name, flat in whole.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers."""
        return {name: buffer.clone() for name, buffer in persistent_buffers(self.state.engine.module).items()}

    def close(self) -> None:
        """End reading."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _build(self, plan: TrainPlan, step: int, checkpoint: Checkpoint | None = None) -> None:
        """The state after `step` steps, as `pipeline.train` makes it: from a checkpoint, or the one that begins."""
        self.close()
        self._state = None
        gc.collect()  # engines are in circles of references, and two of them may not fit
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self.plan, self.step = plan, step
        model, weights = build_model(plan, self._ranks.device), None
        if checkpoint is None and (location := self._starting_weights()) is not None:
            fitted = fitted_start(plan, location, self._folder, model, self._ranks, self._scratch)
            fitted.fill_buffers(model)
            weights = fitted.parameters
        self._state = TrainingState(build_engine(model, plan.stage, self._ranks), self._ranks, plan.stage.ema_decay)
        if checkpoint is not None:
            self._state.load(checkpoint)
        elif weights is not None:
            self._state.set_weights(weights)


def skipped_samples(batches: Sequence[MicroBatch], ranks: Ranks) -> tuple[str, ...]:
    """The samples of all ranks' `batches` that were replaced, with the reasons; all ranks call this."""
    own = [f"{one.shard}/{one.key}: {one.reason}" for batch in batches for one in batch.skipped]
    return tuple(name for text in ranks.gather_texts(json.dumps(own)) for name in json.loads(text))
