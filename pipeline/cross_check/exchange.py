"""What a rank has read of a micro-batch, sent to others: no shard is fetched and no image decoded a second time."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.stream import MicroBatch, SampleOrigin, erased_rectangles
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.training.training_batches import train_transform


def from_next_rank(own: MicroBatch, plan: TrainPlan, ranks: Ranks) -> MicroBatch:
    """The micro-batch of the next rank in the ring, while `own` goes to the one before."""
    return _unpacked(ranks.from_next(_packed(own, ranks.device)), own, plan)


def from_rank(owner: int, own: MicroBatch, plan: TrainPlan, ranks: Ranks) -> MicroBatch:
    """The micro-batch of rank `owner`, on all ranks; each gives its `own`."""
    return _unpacked(ranks.broadcast_tensor(owner, _packed(own, ranks.device)), own, plan)


def _packed(batch: MicroBatch, device: torch.device) -> Tensor:
    """Labels, origins and pixels as one row of bytes on `device`; as many on all ranks."""
    origins = np.array([(origin.epoch, origin.id) for origin in batch.origins], np.int64)
    parts: list[NDArray[np.uint8]] = [batch.labels.view(np.uint8), origins.view(np.uint8), batch.images]
    return torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts])).to(device)


def _unpacked(packed: Tensor, like: MicroBatch, plan: TrainPlan) -> MicroBatch:
    """What was packed, of the same shapes as `like`. Which rectangles are erased follows from the origins."""
    data: NDArray[np.uint8] = packed.cpu().numpy()
    labels, origins, images = np.split(data, np.cumsum([like.labels.nbytes, 16 * len(like.origins)]))
    samples: list[tuple[int, int]] = [
        (epoch, sample) for epoch, sample in origins.view(np.int64).reshape(-1, 2).tolist()
    ]
    return MicroBatch(
        images.reshape(like.images.shape),
        labels.view(np.int64).reshape(like.labels.shape),
        like.weights,
        [],
        [SampleOrigin(epoch, sample, "", "") for epoch, sample in samples],
        erased_rectangles(train_transform(plan), plan.seed, samples),
    )
