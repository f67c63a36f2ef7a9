"""The sample order: every sample exactly once, independent of the cluster, a function of the step."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import SampleOrder, default_lanes, evaluation_positions


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """Orders of small, awkward datasets: one-sample and empty shards, fewer samples than the batch, lanes that do not
    divide."""
    shards = draw(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any))
    lanes = draw(st.integers(1, min(8, sum(shards))))
    return SampleOrder(
        shard_samples=np.array(shards, np.int64),
        seed=draw(st.integers(0, 5)),
        batch=lanes * draw(st.integers(1, 4)),
        lanes=lanes,
        window=draw(st.sampled_from([1, 2, 3, 8, 8192])),
    )


def lane_stream(order: SampleOrder, lane: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and ids of the first `count` samples or more of one lane."""
    per_lane = order.batch // order.lanes
    parts = [order.at(t, lane * per_lane, (lane + 1) * per_lane) for t in range(-(-count // per_lane))]
    return np.concatenate([p.epoch for p in parts]), np.concatenate([p.id for p in parts])


@settings(max_examples=150, deadline=None)
@given(orders())
def test_each_lane_epoch_has_each_of_its_samples_once_and_all_lanes_together_all(order: SampleOrder) -> None:
    for epoch in (0, 1, 2):
        seen: list[int] = []
        for lane in range(order.lanes):
            length = (lane + 1) * order.samples // order.lanes - lane * order.samples // order.lanes
            epochs, ids = lane_stream(order, lane, 3 * length)
            mine = ids[epochs == epoch]
            assert len(mine) == length
            assert np.array_equal(np.flatnonzero(epochs == epoch), np.arange(epoch * length, (epoch + 1) * length))
            seen += mine.tolist()
        assert sorted(seen) == list(range(order.samples))


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 40), st.data())
def test_any_division_of_the_batch_gives_the_same_samples(order: SampleOrder, step: int, data: st.DataObject) -> None:
    whole = order.at(step, 0, order.batch)
    cuts = sorted(data.draw(st.sets(st.integers(0, order.batch), max_size=5)) | {0, order.batch})
    parts = [order.at(step, a, b) for a, b in itertools.pairwise(cuts)]
    for field in range(4):
        assert np.array_equal(np.concatenate([part[field] for part in parts]), whole[field])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 50), st.data())
def test_ranks_of_any_world_size_divide_a_step_among_them(
    micro_batch: int, shards: list[int], step: int, data: st.DataObject
) -> None:
    micro_batches = data.draw(st.integers(1, 64))
    batch = micro_batch * micro_batches
    lanes = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0 and n <= sum(shards)]))
    order = SampleOrder(np.array(shards, np.int64), seed=1, batch=batch, lanes=lanes, window=16)
    whole = order.at(step, 0, batch).id.tolist()
    for world_size in [n for n in range(1, 65) if micro_batches % n == 0]:
        share = batch // world_size
        ranks = [
            [
                order.at(step, start, start + micro_batch).id.tolist()
                for start in range(r * share, (r + 1) * share, micro_batch)
            ]
            for r in range(world_size)
        ]
        assert [sample for rank in ranks for atom in rank for sample in atom] == whole


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 40), st.integers(1, 5), st.data())
def test_shards_ahead_are_those_that_the_next_steps_read_and_fit_the_greatest_need(
    order: SampleOrder, step: int, steps: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.sampled_from([n for n in range(1, order.batch + 1) if order.batch % n == 0]))
    ranks_of_node = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    share = order.batch // ranks
    shard_bytes = np.array(
        data.draw(st.lists(st.integers(1, 99), min_size=len(order.shard_samples), max_size=len(order.shard_samples))),
        np.int64,
    )
    for node in range(0, ranks, ranks_of_node):
        wanted: set[int] = set()
        for rank in range(node, node + ranks_of_node):
            start, stop = rank * share, (rank + 1) * share
            now, ahead = order.shards_ahead(step, start, stop, steps)
            read = {int(n) for t in range(step, step + steps) for n in order.at(t, start, stop).shard}
            assert read <= set(now)
            assert not set(now) & set(ahead)
            wanted |= {*now, *ahead}
        need = order.greatest_need(shard_bytes, ranks, ranks_of_node, steps)
        assert shard_bytes[list(wanted)].sum() <= need <= shard_bytes.sum()


def test_the_next_window_is_prefetched() -> None:
    order = SampleOrder(np.full(100, 10), seed=0, batch=20, lanes=2, window=50)
    for step in range(0, 48, 5):
        now, ahead = order.shards_ahead(step, 0, 10, 1)
        following = {int(n) for t in range(step + 5, step + 10) for n in order.at(t, 0, 10).shard}
        assert following <= {*now, *ahead}
        assert len({*now, *ahead}) <= 12


def windows_of(order: SampleOrder, lane: int, steps: int) -> list[tuple[int, int]]:
    """Of a lane that gives one sample a step from shards of one sample: the steps at which a window begins, and the
    number of its samples."""
    found = [(step, frozenset(order.shards_ahead(step, lane, lane + 1, 1)[0])) for step in range(steps)]
    return [(s, len(now)) for (_, before), (s, now) in itertools.pairwise([(-1, frozenset()), *found]) if now != before]


def test_lanes_change_windows_one_by_one_and_no_window_is_a_short_remainder() -> None:
    lanes, length, window = 16, 287, 40  # seven windows and seven samples
    order = SampleOrder(np.ones(lanes * length, np.int64), seed=0, batch=lanes, lanes=lanes, window=window)
    changes = Counter[int]()
    for lane in range(lanes):
        windows = windows_of(order, lane, length)
        assert sum(size for _, size in windows) == length
        assert all(27 <= size <= 45 for _, size in windows)  # about 287 / 8
        assert {size for _, size in windows[2:-2]} <= {35, 36}
        changes.update(step for step, _ in windows)
    del changes[0]
    assert sum(changes.values()) == 7 * lanes
    assert max(changes.values()) <= 2


def test_empty_shards_have_no_place_in_the_order() -> None:
    sizes = np.array([0, 4, 0, 0, 7, 5, 0], np.int64)
    filled = np.flatnonzero(sizes)
    one, other = (SampleOrder(s, seed=3, batch=4, lanes=2, window=3) for s in (sizes, sizes[filled]))
    for step in range(12):
        with_empty, without = one.at(step, 0, 4), other.at(step, 0, 4)
        assert np.array_equal(with_empty.shard, filled[without.shard])
        assert np.array_equal(with_empty.id, without.id)
        now, ahead = other.shards_ahead(step, 0, 4, 2)
        assert one.shards_ahead(step, 0, 4, 2) == (filled[now].tolist(), filled[ahead].tolist())
    assert one.greatest_need(np.array([99, 1, 99, 99, 1, 1, 99]), 1, 1, 2) == 3


@pytest.mark.parametrize(
    ("batch", "samples", "lanes"),
    [(4096, 10**7, 64), (12, 10**7, 12), (100, 10**7, 50), (67, 10**7, 1), (96, 10**7, 48), (64, 45, 32), (8, 1, 1)],
)
def test_by_default_there_are_as_many_lanes_as_batch_and_samples_allow(batch: int, samples: int, lanes: int) -> None:
    assert default_lanes(batch, samples) == lanes


def test_place_in_the_shard_agrees_with_the_id() -> None:
    sizes = np.array([3, 1, 5, 2], np.int64)
    order = SampleOrder(shard_samples=sizes, seed=0, batch=4, lanes=2, window=4)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for step in range(20):
        samples = order.at(step, 0, 4)
        assert np.array_equal(starts[samples.shard] + samples.place, samples.id)
        assert (samples.place < sizes[samples.shard]).all()


def test_epochs_and_seeds_differ() -> None:
    def ids(seed: int, step: int) -> list[int]:
        order = SampleOrder(shard_samples=np.full(20, 10), seed=seed, batch=200, lanes=4, window=50)
        found: list[int] = order.at(step, 0, 200).id.tolist()
        return found

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(0, 1)
    assert ids(0, 0) != ids(1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 3}, "3 lanes do not divide the global batch of 8; 2 would"),
        ({"lanes": 8, "shard_samples": np.array([5])}, "8 lanes for 5 samples"),
        ({"window": 0}, "shuffle window of 0"),
    ],
)
def test_an_impossible_order_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"shard_samples": np.array([10, 10]), "seed": 0, "batch": 8, "lanes": 4, "window": 16} | change
    with pytest.raises(DataError, match=message):
        SampleOrder(**arguments)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 8))
def test_evaluation_covers_every_sample_once_with_equal_work_on_all_ranks(
    samples: int, world_size: int, micro_batch: int
) -> None:
    shares = [evaluation_positions(samples, rank, world_size, micro_batch) for rank in range(world_size)]
    assert len({ids.shape for ids, _ in shares}) == 1
    counted = np.concatenate([ids[weights == 1] for ids, weights in shares])
    assert sorted(counted.tolist()) == list(range(samples))


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(1, 12))
def test_shards_by_need_begin_with_those_that_the_first_steps_draw_from(order: SampleOrder, steps: int) -> None:
    drawn = {int(shard) for step in range(steps) for shard in order.at(step, 0, order.batch).shard}
    needed = order.shards_by_need(steps)
    assert drawn <= set(needed)
    every = order.shards_by_need(10**9)
    assert every[: len(needed)] == needed
    assert sorted(every) == np.flatnonzero(order.shard_samples).tolist()


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(("batch", "step"), [(24, 5), (4, 5), (24, 1)])
def test_another_batch_goes_on_in_every_lane_where_the_last_one_ended(lanes: int, batch: int, step: int) -> None:
    order = SampleOrder(np.array([5, 0, 9, 7, 11]), seed=3, batch=8, lanes=lanes, window=4)
    other = order.with_batch(batch, step)
    first = [order.at(number, 0, 8).id.reshape(lanes, -1) for number in range(step)]
    then = [other.at(number, 0, batch).id.reshape(lanes, -1) for number in range(step, step + 6)]
    drawn = np.concatenate([*first, *then], axis=1)
    alone = [order.at(number, 0, 8).id.reshape(lanes, -1) for number in range(-(-drawn.size // 8))]
    assert (drawn == np.concatenate(alone, axis=1)[:, : drawn.shape[1]]).all()
    last = step + 5
    now, _ = other.shards_ahead(last, 0, batch, 1)
    assert set(other.at(last, 0, batch).shard.tolist()) <= set(now)
    assert set(other.at(last, 0, batch).shard.tolist()) <= set(other.shards_by_need(last + 1))
