"""The state of a training run: what does not follow from the recipe and the step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pipeline.checkpoints.checkpoint import AVERAGED, Checkpoint, load_state
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import CheckpointFacts, NonFiniteRecord, RunFacts
from pipeline.errors import ConfigError
from pipeline.evaluate import EvaluationStopped
from pipeline.ranks.distributed import Ranks
from pipeline.weights import copy_tensors, load_buffers, persistent_buffers
from pipeline.zero.engine import ZeroEngine
from pipeline.zero.moving_average import MovingAverage


class TrainingState:
    """Weights, AdamW's moments, BatchNorm's statistics and moving averages of an engine.

    Args:
        engine: holds all but the averages.
        ranks: the process group.
        ema_decay: of the moving average, which starts as a copy of the present weights; None for no average.

    Attributes:
        fragments: what this rank holds of weights, moments and averages.
    """

    def __init__(self, engine: ZeroEngine, ranks: Ranks, ema_decay: float | None = None) -> None:
        self.engine = engine
        self._ranks = ranks
        self._buffers = persistent_buffers(engine.module)
        masters = engine.masters
        self._average = MovingAverage(ema_decay, [*masters, *self._buffers.values()]) if ema_decay else None
        averages = self._average.averages if self._average else None
        self.fragments = engine.fragments(averages[: len(masters)] if averages else None)
        self._averaged_buffers = dict(zip(self._buffers, averages[len(masters) :], strict=True)) if averages else {}

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
        load_state(checkpoint, self.fragments, self.engine.parameters.shapes)
        self.engine.optimizer_steps = checkpoint.manifest.facts.optimizer_steps
        load_buffers(self.engine.module, checkpoint, "raw")
        updates = checkpoint.manifest.facts.ema_updates
        if self._average and updates is not None:
            copy_tensors(checkpoint.buffers("ema"), self._averaged_buffers)
            self._average.updates = updates
        self.engine.publish_masters()

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Start from whole float32 `weights`; parameters that are not among them keep theirs."""
        self.engine.write_masters(weights)
        self.engine.publish_masters()
        if self._average:
            self._average.restart()

    def update_average(self) -> None:
        """Move the average, if there is one, after a step that was applied."""
        if self._average:
            self._average.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the engine computes with the averages of weights and buffers; afterwards everything is as before.

        Take no step and start no save inside. All ranks enter together, and leave together: normally or by
        `EvaluationStopped`. After any other exception, which another rank may not share, this rank can only end: it
        keeps the averages, because exchanging them back would wait for ranks that are waiting for this one elsewhere.
        """
        assert self._average is not None
        self._exchange(self._average)
        try:
            yield
        except EvaluationStopped:
            self._exchange(self._average)
            raise
        self._exchange(self._average)

    def live(
        self,
        run: RunFacts,
        step: int,
        samples: int,
        skipped_samples: int,
        non_finite: NonFiniteRecord,
        *,
        for_stop: bool = False,
        classes: tuple[str, ...] | None = None,
    ) -> LiveState:
        """What this rank contributes to a checkpoint after `step` steps, as views of the live tensors.

        `classes` are the names of the model's outputs. The other arguments are as in `CheckpointFacts`.
        """
        updates = self._average.updates if self._average else None
        steps, world_size = self.engine.optimizer_steps, self._ranks.world_size
        facts = CheckpointFacts(run, step, samples, skipped_samples, steps, world_size, updates, non_finite, for_stop)
        buffers = self._buffers | {AVERAGED + name: tensor for name, tensor in self._averaged_buffers.items()}
        return LiveState(facts, self.fragments, buffers, self.engine.parameters.shapes, classes)

    def _exchange(self, average: MovingAverage) -> None:
        average.exchange()
        self.engine.publish_masters()
