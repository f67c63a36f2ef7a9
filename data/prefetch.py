"""How far readers run ahead of what uses their samples, and which shards that keeps open at a time. Numbers alone."""

import numpy as np

from data.dataset import Dataset


def steps_read_ahead(micro_batches: int, workers: int) -> int:
    """Steps between that of the micro-batch asked for and that of the last one being read."""
    return -(-2 * workers // micro_batches)


def evaluation_shards(dataset: Dataset, row: int, per_pass: int, workers: int) -> tuple[list[int], list[int]]:
    """The shards of the passes being read when pass `row` begins, and the two behind them."""
    ends = np.cumsum(dataset.shard_samples)
    first = int(np.searchsorted(ends, max(0, row - 2 * workers) * per_pass, side="right"))
    last = int(np.searchsorted(ends, min((row + 1) * per_pass, dataset.samples) - 1, side="right"))
    return list(range(first, last + 1)), list(range(last + 1, min(last + 3, len(ends))))


def evaluation_need(dataset: Dataset, per_pass: int, workers: int) -> int:
    """Bytes that surely hold what `evaluation_shards` names at any time."""
    samples = np.sort(dataset.shard_samples)
    touched = 4 + int(np.searchsorted(np.cumsum(samples), (2 * workers + 1) * per_pass, side="right"))
    return sum(sorted((shard.bytes for shard in dataset.index.shards), reverse=True)[:touched])
