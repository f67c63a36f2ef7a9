"""How far samples are prefetched, and which shards that needs at the same time: pure arithmetic."""

import numpy as np

from data.dataset import Dataset


def prefetched_steps(micro_batches: int, workers: int) -> int:
    """Steps from that of the micro-batch being consumed to that of the last one being read."""
    return -(-2 * workers // micro_batches)


def evaluation_shards(dataset: Dataset, row: int, per_pass: int, workers: int) -> tuple[list[int], list[int]]:
    """The shards of the passes being read when pass `row` starts, and the two after them."""
    ends = np.cumsum(dataset.shard_samples)
    first = int(np.searchsorted(ends, max(0, row - 2 * workers) * per_pass, side="right"))
    last = int(np.searchsorted(ends, min((row + 1) * per_pass, dataset.samples) - 1, side="right"))
    filled = np.flatnonzero(dataset.shard_samples)  # the others are never read
    now = filled[(filled >= first) & (filled <= last)]
    return now.tolist(), filled[filled > last][:2].tolist()


def evaluation_need(dataset: Dataset, per_pass: int, workers: int) -> int:
    """An upper bound of the bytes of the shards that `evaluation_shards` returns at any time."""
    filled = np.flatnonzero(dataset.shard_samples)
    samples = np.sort(dataset.shard_samples[filled])
    touched = 4 + int(np.searchsorted(np.cumsum(samples), (2 * workers + 1) * per_pass, side="right"))
    return sum(sorted((dataset.index.shards[number].bytes for number in filled), reverse=True)[:touched])
