"""Which samples each rank would read in a step, from the shards of the recipe or from made-up ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.dataset import Dataset
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.order import SampleOrder, Samples
from data.prefetch import evaluation_need
from data.remote.storage import is_remote
from pipeline.errors import RunFailed
from pipeline.plan import TrainPlan, check_length, sample_order, training_need
from pipeline.planner.hardware import bundled_hardware
from pipeline.recipe.schema import TrainStage
from pipeline.training.parts import plan_part

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class AssumedData:
    """The data of a stage whose shards are not here."""

    samples: int
    """For training."""
    classes: int
    samples_per_shard: int = 4096
    bytes_per_sample: int = field(default_factory=lambda: round(bundled_hardware().law.image_bytes.value))
    validation_samples: int = 50_000


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The training data of the rehearsal."""

    source: str
    """The folder of the shards."""
    assumed: bool
    """Whether the shards are made up."""
    samples: int
    classes: int
    shards: int
    shard_bytes: int
    """Of all shards."""
    steps: int
    """Of the stage."""


@dataclass(frozen=True, slots=True)
class StepShare:
    """The samples of one rank in one step."""

    rank: int
    step: int
    """From 0."""
    first_position: int
    """In the batch of the step; the others follow."""
    samples: int
    micro_batches: int
    epochs: tuple[int, ...]
    """How often the samples were seen before; ascending, each once."""
    shards: tuple[int, ...]
    """Positions of their shards in the index, ascending."""
    first_ids: tuple[int, ...]
    """The ids of the first few samples."""


@dataclass(frozen=True, slots=True)
class CacheNeed:
    """Remote shards that a node needs at the same time."""

    remote: bool
    """Whether the shards of the recipe are remote; otherwise nothing is cached, and this is what would be."""
    training_bytes: int
    evaluation_bytes: int
    cache_bytes: int
    """What the recipe allows."""

    @property
    def bytes(self) -> int:
        """For both."""
        return self.training_bytes + self.evaluation_bytes


@dataclass(frozen=True)
class StageData:
    """What the rehearsal knows of a stage's data: the order of the samples and the bytes of the shards."""

    facts: DataFacts
    stage: TrainStage
    order: SampleOrder
    first_step: int
    """From which on the order holds: 0, unless the batch was changed under way."""
    shard_bytes: NDArray[np.int64]
    """(S,) of each training shard."""
    validation: Dataset
    remote_training: bool
    remote_validation: bool

    @classmethod
    def of_plan(cls, plan: TrainPlan) -> "StageData":
        """The data of a stage whose shards can be read."""
        index = plan.train.index
        facts = DataFacts(
            index.folder, False, plan.train.samples, len(plan.classes), len(index.shards), index.bytes, plan.steps
        )
        sizes = np.array([shard.bytes for shard in index.shards], np.int64)
        remote = is_remote(index.folder), is_remote(plan.validation.index.folder)
        return cls(facts, plan.stage, plan.order, plan.first_step, sizes, plan.validation, *remote)

    @classmethod
    def assumed(cls, stage: TrainStage, seed: int, data: AssumedData, where: str) -> "StageData":
        """Made-up shards of equal size in place of those of the stage.

        Raises:
            ConfigError: as for `train_plan`, what does not fit to so many samples.
        """
        shards = -(-data.samples // data.samples_per_shard)
        samples = np.full(shards, data.samples_per_shard, np.int64)
        samples[-1] -= int(samples.sum()) - data.samples
        order = sample_order(stage, seed, samples, where)
        check_length(stage, data.samples, where)
        steps = plan_part(stage, data.samples, None, where).steps
        sizes = samples * data.bytes_per_sample
        train, validation = stage.data.train or "", stage.data.validation
        facts = DataFacts(train, True, data.samples, data.classes, shards, int(sizes.sum()), steps)
        remote = is_remote(train), is_remote(validation)
        return cls(facts, stage, order, 0, sizes, _made_up(validation, data), *remote)

    @property
    def first_and_last(self) -> tuple[int, ...]:
        """The steps that are looked at, from 0."""
        return tuple(dict.fromkeys((self.first_step, self.facts.steps - 1)))

    def share(self, step: int, rank: int, ranks: int) -> StepShare:
        """What `rank` of `ranks` reads in `step`, which is one of `first_and_last` or between."""
        size = self.stage.batch.global_size // ranks
        found = self.order.at(step, rank * size, (rank + 1) * size)
        return StepShare(
            rank,
            step,
            rank * size,
            size,
            size // self.stage.batch.micro_size,
            tuple(np.unique(found.epoch).tolist()),
            tuple(np.unique(found.shard).tolist()),
            tuple(found.id[:_SHOWN].tolist()),
        )

    def check_seen_once(self, step: int, ranks: int) -> int:
        """Check that the shares of all ranks are the batch of `step`, each of its samples once.

        Returns:
            The samples that were checked.

        Raises:
            RunFailed: they are not.
        """
        batch, size = self.stage.batch.global_size, self.stage.batch.global_size // ranks
        parts = [self.order.at(step, rank * size, (rank + 1) * size) for rank in range(ranks)]
        seen = np.concatenate([_keys(part, self.facts.samples) for part in parts])
        whole = _keys(self.order.at(step, 0, batch), self.facts.samples)
        # A batch may have a sample twice where an epoch ends within it, in two epochs.
        if len(np.unique(seen)) != batch or not np.array_equal(np.sort(seen), np.sort(whole)):
            raise RunFailed(
                f"rehearsal: step {step:,} on {ranks} ranks: {len(seen):,} samples are read, {len(np.unique(seen)):,} "
                f"of them different, and the batch has {batch:,}; the order of samples is wrong, please report it"
            )
        return len(seen)

    def cache_need(self, ranks: int) -> CacheNeed:
        """What a node of the stage needs."""
        stage, cache = self.stage, self.stage.data.cache
        return CacheNeed(
            self.remote_training or self.remote_validation,
            training_need(stage, ranks, self.order, self.shard_bytes),
            evaluation_need(self.validation, stage.batch.micro_size * ranks, stage.data.workers),
            int(cache.gigabytes * 1e9),
        )


def _keys(samples: Samples, of_epoch: int) -> NDArray[np.int64]:
    """(n,) a number for each sample in its epoch."""
    return samples.epoch * of_epoch + samples.id


def _made_up(folder: str, data: AssumedData) -> Dataset:
    shards: Sequence[ShardEntry] = [
        ShardEntry(f"{number:06d}.tar", count, max(1024, data.bytes_per_sample) * count, "0" * 64)
        for number, count in enumerate(_sizes(data.validation_samples, data.samples_per_shard))
    ]
    return Dataset(ShardIndex(folder, class_names(data.classes), ("jpg",), LabelFormat(), tuple(shards)))


def class_names(classes: int) -> tuple[str, ...]:
    """Made-up names, as long as those of ImageNet."""
    return tuple(f"n{number:08d}" for number in range(classes))


def _sizes(samples: int, of_shard: int) -> list[int]:
    return [min(of_shard, samples - start) for start in range(0, samples, of_shard)]
