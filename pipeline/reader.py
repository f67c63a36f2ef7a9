"""The training loop's end of the data: one rank's micro-batches, and a limit to what may be broken."""

from collections.abc import Generator

from data.augment import TrainTransform
from data.errors import DataError
from data.stream import MicroBatch, training_stream
from pipeline.distributed import Ranks
from pipeline.plan import TrainPlan
from pipeline.run_folder import RunFolder

_TOLERATED = 10  # samples that may be broken whatever their share, so that one early one does not end a run


def read_micro_batches(plan: TrainPlan, folder: RunFolder, ranks: Ranks, first_step: int) -> Generator[MicroBatch]:
    """This rank's micro-batches from `first_step` on, without end; samples that were skipped go into the diary.

    Raises:
        DataError: too many samples do not decode.
    """
    data = plan.stage.data
    stream = training_stream(
        plan.train,
        plan.order,
        TrainTransform(plan.stage.resolution, data.crop, data.crop_area, data.flip),
        micro_batch=plan.stage.batch.micro_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        first_step=first_step,
        workers=data.workers,
    )
    seen = skipped = 0
    for batch in stream:
        seen += len(batch.labels)
        for sample in batch.skipped:
            skipped += 1
            folder.note("sample_skipped", shard=sample.shard, key=sample.key, reason=sample.reason, rank=ranks.rank)
        if skipped > max(_TOLERATED, data.skipped_share * seen):
            last = batch.skipped[-1]
            raise DataError(
                f"{plan.train.folder}: {skipped:,} of the first {seen:,} samples do not decode (last: {last.key} in "
                f"{last.shard}: {last.reason}); repair the shards, or raise data.skipped_share"
            )
        yield batch
