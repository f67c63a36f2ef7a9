"""The sample order: which samples form which batch, as a pure function of the index, the seed and the step.

Epoch e orders the shards that have samples by a permutation drawn from (seed, e); concatenated in that order they form
N slots. The slots are divided into C lanes: lane c owns slots floor(c N / C) .. floor((c+1) N / C) of every epoch and
is an endless stream, its epoch 0 slots, then its epoch 1 slots, and so on, shuffled within windows by (seed, e, c,
window). Step t takes B / C samples from every lane, in lane order. So epochs have no end that needs handling, the order
is independent of the numbers of ranks, workers and micro-batches, and the state of a reader is the step. If B changes
within a run, the lanes go on from where they are: `offset` is what step t then starts at beyond t B / C.

The windows of a lane are equally long, apart from its first two and last two of an epoch, whose lengths differ from
lane to lane by up to a quarter. So the lanes move to other shards one by one, and no window is a short remainder.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.random_streams import RandomStream

_DEFAULT_LANES = 64
_GOLDEN = 2654435769  # 2^32 divided by the golden ratio: spreads consecutive numbers evenly, however many there are
_SHIFTED = 2  # windows at each end of a lane-epoch whose lengths differ from lane to lane

Int64 = NDArray[np.int64]


class Samples(NamedTuple):
    """Aligned arrays (n,) of int64."""

    epoch: Int64
    """How many times the sample was seen before."""
    shard: Int64
    """Position of its shard in the index."""
    place: Int64
    """Its position in the shard."""
    id: Int64
    """Its id in the index: the number of samples in all earlier shards of the index, plus `place`."""


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The order of one training run.

    Args:
        shard_samples: (S,) int64, number of samples of each shard in index order.
        seed: of all permutations.
        batch: B, samples of a step over all ranks.
        lanes: C; divides B and is at most the number of samples.
        window: about how many samples are shuffled together; bounds memory and open shards. A window is at most a
            quarter longer.
        offset: of the positions in every lane, in samples; not 0 if earlier steps of the run had another batch.

    Raises:
        DataError: the lanes do not divide the batch or outnumber the samples, or the window is below 1.
    """

    shard_samples: Int64
    seed: int
    batch: int
    lanes: int
    window: int
    offset: int = 0
    samples: int = field(init=False)
    """N, samples of one epoch."""
    _starts: Int64 = field(init=False)
    _filled: Int64 = field(init=False)
    _narrow: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        total = int(self.shard_samples.sum())
        if self.lanes < 1 or self.batch % self.lanes:
            near = [n for n in range(1, self.batch + 1) if self.batch % n == 0 and n <= max(1, self.lanes)][-1]
            raise DataError(f"{self.lanes} lanes do not divide the global batch of {self.batch}; {near} would")
        if self.lanes > total:
            raise DataError(f"{self.lanes} lanes for {total} samples: a lane needs at least one; use fewer lanes")
        if self.window < 1:
            raise DataError(f"a shuffle window of {self.window} samples: it must be at least 1")
        starts = np.concatenate([[0], np.cumsum(self.shard_samples)[:-1]]).astype(np.int64)
        object.__setattr__(self, "samples", total)
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_filled", np.flatnonzero(self.shard_samples))
        object.__setattr__(self, "_narrow", self.shard_samples.astype(np.int32))
        # Caches per instance, so that they are freed with it.
        object.__setattr__(self, "_epoch_shards", lru_cache(4)(self._epoch_shards))
        object.__setattr__(self, "_window_order", lru_cache(4 * self.lanes)(self._window_order))

    def at(self, step: int, start: int, stop: int) -> Samples:
        """The samples at positions `start` .. `stop` of the global batch of `step`."""
        per_lane = self.batch // self.lanes
        positions = np.arange(start, stop, dtype=np.int64)
        lane = positions // per_lane
        position = self.offset + step * per_lane + positions % per_lane  # in the lane's endless stream
        epoch = np.empty_like(position)
        slot = np.empty_like(position)
        for c in np.unique(lane):
            mine = lane == c
            first, last = self._lane_slots(int(c))
            epoch[mine], offset = np.divmod(position[mine], last - first)
            slot[mine] = first + self._shuffled(int(c), epoch[mine], offset, last - first)
        return self._locate(epoch, slot)

    def with_batch(self, batch: int, step: int) -> "SampleOrder":
        """This order from step `step` on with another batch: every lane goes on from where it is then.

        Raises:
            DataError: the lanes do not divide the batch.
        """
        offset = self.offset + step * (self.batch // self.lanes - batch // self.lanes)
        return replace(self, batch=batch, offset=offset)

    def shards_ahead(self, step: int, start: int, stop: int, steps: int) -> tuple[list[int], list[int]]:
        """The shards that positions `start` .. `stop` of the batch read in `steps` steps, starting with `step`.

        First those of the windows that these steps draw from, then those of the next window, lane by lane.
        """
        per_lane = self.batch // self.lanes
        now: dict[int, None] = {}
        following: dict[int, None] = {}
        for lane in range(start // per_lane, -(-stop // per_lane)):
            first, last = self._lane_slots(lane)
            windows = _LaneWindows.of(lane, last - first, self.window)
            position, end = (self.offset + number * per_lane for number in (step, step + steps))
            shards = now
            while True:
                epoch, offset = divmod(position, windows.length)
                number = int(windows.containing(np.array([offset]))[0])
                begin, after = windows.start(number), windows.start(number + 1)
                shards |= dict.fromkeys(self._shards_between(epoch, first + begin, first + after))
                if shards is following:
                    break
                position += after - offset
                shards = now if position < end else following
        return list(now), [number for number in following if number not in now]

    def shards_by_need(self, steps: int) -> list[int]:
        """The shards that the first `steps` steps draw from, in the order in which they are needed first.

        At the end there may be some that only later steps draw from.
        """
        shards, ends = self._epoch_shards(0)
        begins = ends - self.shard_samples[shards]
        lanes = np.arange(self.lanes + 1, dtype=np.int64) * self.samples // self.lanes  # ends with the number of slots
        lane = np.searchsorted(lanes, begins, side="right") - 1
        # Slots that the lane in which the shard begins has before it, unless another lane begins inside of the shard.
        before = np.where(lanes[lane + 1] < ends, 0, begins - lanes[lane])
        drawn = self.offset + steps * (self.batch // self.lanes) + self.window * 5 // 4 + 1
        found = np.argsort(before, kind="stable")
        return [int(number) for number in shards[found[before[found] < drawn]]]

    def _shards_between(self, epoch: int, first_slot: int, end_slot: int) -> list[int]:
        shards, ends = self._epoch_shards(epoch)
        begin = int(np.searchsorted(ends, first_slot, side="right"))
        end = int(np.searchsorted(ends, end_slot - 1, side="right"))
        return [int(number) for number in shards[begin : end + 1]]

    def greatest_need(self, shard_bytes: Int64, ranks: int, ranks_of_node: int, steps: int) -> int:
        """An upper bound of the bytes of the shards that `shards_ahead` returns at any time for the ranks of one node.

        Args:
            shard_bytes: (S,) int64.
            ranks: of the whole run.
            ranks_of_node: of one node, which are neighbours.
            steps: as for `shards_ahead`.
        """
        per_lane, positions = self.batch // self.lanes, self.batch // ranks * min(ranks, ranks_of_node)
        lanes = max(
            -(-min(start + positions, self.batch) // per_lane) - start // per_lane
            for start in range(0, self.batch, positions)
        )
        all_lanes = [(lane, *self._lane_slots(lane)) for lane in range(self.lanes)]
        each = [_LaneWindows.of(lane, last - first, self.window) for lane, first, last in all_lanes]
        shortest = self.samples // self.lanes
        # Consecutive windows together differ from so many of the usual length by this at most.
        shifted = _SHIFTED * max(abs(one.stretch) for one in each)
        windows = (steps * per_lane - 2 + shifted) // min(one.length // one.windows for one in each) + 3
        usual = max(-(-one.length // one.windows) for one in each)
        epochs = windows // min(one.windows for one in each) + 2
        span = min(windows * usual + shifted, epochs * (shortest + 1))
        # n consecutive slots touch at most two shards besides those fully inside; a new epoch starts elsewhere.
        sizes = np.sort(self.shard_samples[self._filled])
        inside = int(np.searchsorted(np.cumsum(sizes), span, side="right"))
        touched = lanes * (inside + 2 * (2 + span // max(1, shortest)))
        return int(np.sort(shard_bytes[self._filled])[::-1][:touched].sum())

    def _lane_slots(self, lane: int) -> tuple[int, int]:
        return lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes

    def _shuffled(self, lane: int, epoch: Int64, offset: Int64, length: int) -> Int64:
        """Offsets (n,) in the lane-epoch after shuffling within each window."""
        shuffled = np.empty_like(offset)
        windows = _LaneWindows.of(lane, length, self.window)
        numbers = windows.containing(offset)
        for e, w in {(int(e), int(w)) for e, w in zip(epoch, numbers, strict=True)}:
            inside = (epoch == e) & (numbers == w)
            begin = windows.start(w)
            order = self._window_order(e, lane, w, windows.start(w + 1) - begin)
            shuffled[inside] = begin + order[offset[inside] - begin]
        return shuffled

    def _window_order(self, epoch: int, lane: int, window: int, size: int) -> NDArray[np.int32]:
        order = RandomStream.WINDOW_ORDER.generator(self.seed, epoch, lane, window).permutation(size)
        return order.astype(np.int32)  # half the memory while it is kept

    def _epoch_shards(self, epoch: int) -> tuple[Int64, Int64]:
        """The shards of an epoch that have samples in reading order (F,), and the slot at which each of them ends."""
        shards = self._filled[RandomStream.SHARD_ORDER.generator(self.seed, epoch).permutation(len(self._filled))]
        # Half the width, half the cache misses, which dominate the first access to an epoch.
        return shards, np.cumsum(self._narrow[shards], dtype=np.int64)

    def _locate(self, epoch: Int64, slot: Int64) -> Samples:
        shard = np.empty_like(slot)
        place = np.empty_like(slot)
        for e in np.unique(epoch):
            mine = epoch == e
            shards, ends = self._epoch_shards(int(e))
            turn = np.searchsorted(ends, slot[mine], side="right")
            shard[mine] = shards[turn]
            place[mine] = slot[mine] - (ends[turn] - self.shard_samples[shards[turn]])
        return Samples(epoch, shard, place, self._starts[shard] + place)


class _LaneWindows(NamedTuple):
    """The windows of one lane in every epoch: `windows` of them, which together have `length` slots."""

    length: int
    windows: int
    stretch: int
    """Slots by which each of the first `_SHIFTED` windows is longer, and each of the last ones shorter."""

    @classmethod
    def of(cls, lane: int, length: int, window: int) -> "_LaneWindows":
        plain = cls(length, -(-length // window), 0)
        # -1/2 .. 1/2, which for lane 0 is 0. After the first two windows the lanes are spread over a whole one.
        phase = (lane * _GOLDEN + 2**31) % 2**32 - 2**31
        return plain._replace(stretch=2 * phase * (length // plain.windows // 4) // 2**32)

    def start(self, number: int) -> int:
        """The first slot of window `number`; of the one after the last, the number of all slots."""
        return number * self.length // self.windows + self.stretch * min(_SHIFTED, number, self.windows - number)

    def containing(self, slot: Int64) -> Int64:
        """The windows (n,) that contain the slots (n,)."""
        near = (
            slot * self.windows // self.length
        )  # exact or a neighbour, since starts are shifted by at most half a window
        after, before = self._starts(near + 1) <= slot, self._starts(near) > slot
        return near + after - before

    def _starts(self, number: Int64) -> Int64:
        shifted = np.minimum(_SHIFTED, np.minimum(number, self.windows - number))
        starts: Int64 = number * self.length // self.windows + self.stretch * shifted
        return starts


def default_lanes(batch: int, samples: int) -> int:
    """The number of lanes unless another is chosen: the greatest divisor of the batch up to 64, or up to `samples`."""
    return max(n for n in range(1, min(_DEFAULT_LANES, batch, max(1, samples)) + 1) if batch % n == 0)


def lanes_read(batch: int, lanes: int, positions: int) -> int:
    """How many lanes are read by each reader of `positions` neighbouring positions of a batch, summed over the readers.

    That is the number of lanes if none of them is shared, as lanes are neighbouring positions, too. The last reader may
    have fewer positions.
    """
    per_lane = batch // lanes
    starts = range(0, batch, positions)
    return sum(-(-min(start + positions, batch) // per_lane) - start // per_lane for start in starts)


def evaluation_positions(
    samples: int, rank: int, world_size: int, micro_batch: int
) -> tuple[Int64, NDArray[np.float32]]:
    """Sample ids and weights of one rank's share of an evaluation over `samples` samples.

    Both (micro-batches, micro_batch). Every sample has weight 1 on exactly one rank; the padding repeats sample 0 with
    weight 0, so that all ranks run the same number of forward passes.
    """
    per_pass = world_size * micro_batch
    passes = -(-samples // per_pass)
    ids = np.arange(passes * per_pass, dtype=np.int64).reshape(passes, world_size, micro_batch)[:, rank]
    weights = (ids < samples).astype(np.float32)
    return np.where(ids < samples, ids, 0), weights
