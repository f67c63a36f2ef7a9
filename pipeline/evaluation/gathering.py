"""Arrays and records of one rank on the others, by the sums that `Ranks` has."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.ranks.distributed import Ranks


def array_of_rank(ranks: Ranks, rank: int, own: NDArray[np.int64]) -> NDArray[np.int64]:
    """The array (n,) of `rank`, on every rank; all of them call this with their `own`."""
    is_sender = ranks.rank == rank
    size = int(ranks.sum(torch.tensor([len(own) if is_sender else 0], device=ranks.device)).item())
    values = torch.from_numpy(own).to(ranks.device) if is_sender else torch.zeros(size, dtype=torch.int64)
    received: NDArray[np.int64] = ranks.sum(values.to(ranks.device).contiguous()).cpu().numpy()
    return received
