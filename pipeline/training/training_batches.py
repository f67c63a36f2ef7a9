"""The micro-batches of one rank for the training loop, and a limit to the samples that cannot be used."""

from collections.abc import Generator

import torch

from data.errors import DataError
from data.images.augment import TrainTransform
from data.images.color_jitter import ColorJitter
from data.images.random_augment import RandomAugment
from data.images.random_erasing import RandomErasing
from data.stream import MicroBatch, RankShare, SkippedSample, training_stream
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.data_sections import DataSettings
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.training.pixels import pixel_allocator

_CPU = torch.device("cpu")
_TOLERATED = 10  # broken samples whatever their share, so that an early one does not end a run


def read_micro_batches(plan: TrainPlan, folder: RunFolder, ranks: Ranks, first_step: int) -> Generator[MicroBatch]:
    """This rank's micro-batches from `first_step` on, endlessly; skipped samples are recorded in the event log.

    Raises:
        DataError: too many samples cannot be used, or too many in a row.
        StorageDown: remote shards that cannot be fetched.
    """
    data = plan.stage.data
    limits = SkippedLimits(data, data.train or "")
    for batch in open_stream(plan, ranks.rank, ranks.world_size, first_step, ranks.device):
        note_skipped(batch, folder, ranks)
        limits.count(batch)
        yield batch


def open_stream(
    plan: TrainPlan, rank: int, world_size: int, first_step: int, device: torch.device = _CPU
) -> Generator[MicroBatch]:
    """The micro-batches of one rank in the order of the plan, from `first_step` on, endlessly; `device` is the rank's.

    `pixels_to_device` says how long their pixels must be kept.
    """
    return training_stream(
        plan.train,
        plan.order,
        train_transform(plan),
        RankShare(rank, world_size, plan.stage.batch.micro_size),
        first_step=first_step,
        workers=plan.stage.data.workers,
        cache=plan.cache,
        allocate=pixel_allocator(device),
        excluded=frozenset(plan.stage.data.excluded_samples),
    )


def train_transform(plan: TrainPlan) -> TrainTransform:
    """The transform of the plan's training images."""
    data, settings = plan.stage.data, plan.stage.data.random_augment
    augment = RandomAugment(settings.layers, settings.magnitude, settings.operations) if settings else None
    jitter = ColorJitter(**data.color_jitter.model_dump()) if data.color_jitter else None
    erasing = RandomErasing(**data.random_erasing.model_dump()) if data.random_erasing else None
    return TrainTransform(plan.stage.resolution, data.crop, data.crop_area, data.flip, augment, jitter, erasing)


def note_skipped(batch: MicroBatch, folder: RunFolder, ranks: Ranks) -> None:
    """Record each sample of a micro-batch that could not be used in the event log."""
    for sample in batch.skipped:
        folder.events.record(
            Event.SAMPLE_SKIPPED, shard=sample.shard, key=sample.key, reason=sample.reason, rank=ranks.rank
        )


class SkippedLimits:
    """Counts the samples of one rank that cannot be used, and ends the run when there are too many.

    Args:
        data: has the limits.
        place: of the samples, for the message.
        share, run: the names of the two limits, for the message.
    """

    def __init__(
        self, data: DataSettings, place: str, share: str = "data.skipped_share", run: str = "data.skipped_run"
    ) -> None:
        self._data, self._place = data, place
        self._share, self._run = share, run
        self._seen = self._skipped = self._in_a_row = 0

    def count(self, batch: MicroBatch) -> None:
        """Add a micro-batch.

        Raises:
            DataError: more than `skipped_share` of all samples, or more than `skipped_run` in a row.
        """
        self._seen += len(batch.labels)
        unusable = [sample for sample in batch.skipped if not sample.excluded]
        self._skipped += len(unusable)
        broken = {sample.position for sample in unusable}
        for position in range(len(batch.labels)):
            self._in_a_row = self._in_a_row + 1 if position in broken else 0
            if self._in_a_row > self._data.skipped_run:
                self._stop(unusable[-1], f"raise {self._run} ({self._data.skipped_run})")
        if self._skipped > max(_TOLERATED, self._data.skipped_share * self._seen):
            self._stop(unusable[-1], f"raise {self._share} ({self._data.skipped_share:g})")

    def _stop(self, last: SkippedSample, fix: str) -> None:
        raise DataError(
            f"{self._place}: {self._skipped:,} of the first {self._seen:,} samples cannot be used (last: {last.key} in "
            f"{last.shard}: {last.reason}); repair the shards, or {fix}"
        )
