"""The state of a training run: what does not follow from the recipe and the step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.checkpoint import AVERAGED, Checkpoint, load_state
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import CheckpointFacts, RunFacts
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError
from pipeline.weights import copy_tensors, load_buffers, persistent_buffers
from pipeline.zero.fragments import (
    fragments,
    holders,
    optimizer_steps,
    parameter_slices,
    publish_masters,
    set_optimizer_steps,
)
from pipeline.zero.moving_average import MovingAverage


class TrainingState:
    """Weights, AdamW's moments, BatchNorm's statistics and moving averages, as they live in a DeepSpeed engine.

    Args:
        engine: of `build_engine`.
        shapes: those of the model's parameters before the engine took them: ZeRO 3 leaves them empty.
        ranks: the process group.
        ema_decay: of the moving average, which begins as a copy of what is there; None for no average.
    """

    def __init__(
        self, engine: Any, shapes: dict[str, tuple[int, ...]], ranks: Ranks, ema_decay: float | None = None
    ) -> None:
        self._engine = engine
        self.shapes = shapes
        self._ranks = ranks
        masters = holders(parameter_slices(engine, ranks))
        self._buffers = persistent_buffers(engine.module)
        self._average = MovingAverage(ema_decay, [*masters, *self._buffers.values()]) if ema_decay else None
        averages = self._average.averages[: len(masters)] if self._average else None
        self._averaged_buffers = (
            dict(zip(self._buffers, self._average.averages[len(masters) :], strict=True)) if self._average else {}
        )
        self.fragments = fragments(engine, ranks, averages)
        """What this rank holds of weights, moments and averages."""

    @property
    def has_average(self) -> bool:
        """Whether there is a moving average."""
        return self._average is not None

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, whatever its number of ranks and ZeRO stage.

        Raises:
            ConfigError: it is another model's, or only one of the two has a moving average.
        """
        if checkpoint.has_average != self.has_average:
            saved, now = ("with", "without") if checkpoint.has_average else ("without", "with")
            raise ConfigError(
                f"{checkpoint.location}: saved {saved} a moving average, and this run is {now} one; "
                "restore ema_decay, or give the recipe another name"
            )
        load_state(checkpoint, self.fragments, self.shapes)
        set_optimizer_steps(self._engine, checkpoint.manifest.facts.optimizer_steps)
        load_buffers(self._engine.module, checkpoint, "raw")
        updates = checkpoint.manifest.facts.ema_updates
        if self._average and updates is not None:
            copy_tensors(checkpoint.buffers("ema"), self._averaged_buffers)
            self._average.updates = updates
        publish_masters(self._engine)

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Begin with whole float32 `weights`; parameters that are not among them keep theirs."""
        for fragment in self.fragments:
            if fragment.parameter in weights:
                whole = weights[fragment.parameter].view(-1)
                fragment.tensors["master"].copy_(whole[fragment.start : fragment.stop])
        publish_masters(self._engine)
        if self._average:
            self._average.restart()

    def update_average(self) -> None:
        """After each step that was applied: move the average, if there is one."""
        if self._average:
            self._average.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the engine computes with the averages of weights and buffers; afterwards everything is as it was.

        Neither steps nor saves belong inside. All ranks enter together.
        """
        assert self._average is not None
        self._exchange(self._average)
        try:
            yield
        finally:
            self._exchange(self._average)

    def live(self, run: RunFacts, step: int, samples: int, skipped_samples: int) -> LiveState:
        """What this rank contributes to a checkpoint after `step` steps, as views of what is trained."""
        updates = self._average.updates if self._average else None
        steps, world_size = optimizer_steps(self._engine), self._ranks.world_size
        facts = CheckpointFacts(run, step, samples, skipped_samples, steps, world_size, updates)
        buffers = self._buffers | {AVERAGED + name: tensor for name, tensor in self._averaged_buffers.items()}
        return LiveState(facts, self.fragments, buffers, self.shapes)

    def _exchange(self, average: MovingAverage) -> None:
        average.exchange()
        publish_masters(self._engine)
