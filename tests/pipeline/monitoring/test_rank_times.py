import pytest

from pipeline.monitoring.rank_times import RankTimes


def step(world_size: int, **slow: tuple[int, float]) -> list[float]:
    """Data waits of 0.01 s and forwards of 0.1 s, except for one rank of each kind."""
    waits, forwards = [0.01] * world_size, [0.1] * world_size
    for kind, (rank, seconds) in slow.items():
        (waits if kind == "waits" else forwards)[rank] = seconds
    return waits + forwards


def test_largest_median_and_slowest_rank_are_those_of_the_interval() -> None:
    times = RankTimes(4)
    times.add(step(4, waits=(2, 0.5), forwards=(1, 0.4)))
    times.add(step(4, waits=(2, 0.3)))
    scalars, _ = times.interval(2.0)
    assert scalars == {
        "wall_time/data_wait_share": pytest.approx(0.4),
        "wall_time_of_ranks/data_wait_largest_seconds": pytest.approx(0.4),
        "wall_time_of_ranks/data_wait_median_seconds": pytest.approx(0.01),
        "wall_time_of_ranks/data_wait_slowest_rank": 2,
        "wall_time_of_ranks/forward_largest_seconds": pytest.approx(0.25),
        "wall_time_of_ranks/forward_median_seconds": pytest.approx(0.1),
        "wall_time_of_ranks/forward_slowest_rank": 1,
    }


def test_ranks_that_wait_in_turn_cost_as_much_as_one_that_always_waits() -> None:
    times = RankTimes(2)
    times.add([0.5, 0.0, 0.1, 0.1])
    times.add([0.0, 0.5, 0.1, 0.1])
    assert times.interval(2.0)[0]["wall_time/data_wait_share"] == 0.5


def test_a_single_rank_is_compared_with_none() -> None:
    times = RankTimes(1)
    times.add([0.5, 0.1])
    assert times.interval(1.0) == ({"wall_time/data_wait_share": 0.5}, [])


def test_an_interval_without_steps_reports_nothing() -> None:
    assert RankTimes(2).interval(1.0) == ({}, [])


def intervals(times: RankTimes, slow: list[dict[str, tuple[int, float]]]) -> list[list[str]]:
    messages = []
    for of_interval in slow:
        for _ in range(10):
            times.add(step(8, **of_interval))
        messages.append(times.interval(10.0)[1])
    return messages


def test_a_rank_that_is_slow_for_three_intervals_is_named_once() -> None:
    messages = intervals(RankTimes(8), [{"forwards": (5, 0.4)}] * 6)
    assert [len(of_interval) for of_interval in messages] == [0, 0, 1, 0, 0, 0]
    assert messages[2][0].startswith(
        "rank 5 is slowest in its forward: 0.4 s per step, and the median of all ranks is 0.1 s; look at its GPU's"
    )


def test_waiting_for_data_is_distinguished_from_computing() -> None:
    messages = intervals(RankTimes(8), [{"waits": (3, 0.9)}] * 3)
    assert messages[2][0].startswith("rank 3 waits longest for data: 0.9 s")


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param([{"forwards": (rank, 0.4)} for rank in (5, 5, 6, 5, 5)], id="another rank between"),
        pytest.param([{"forwards": (5, 0.4)}, {"forwards": (5, 0.4)}, {}] * 2, id="a good interval between"),
        pytest.param([{"forwards": (5, 0.14)}] * 5, id="less than half above the median"),
        pytest.param([{"waits": (5, 0.05)}] * 5, id="five times the median, but negligible in a step of a second"),
    ],
)
def test_a_rank_that_is_not_persistently_and_notably_slow_is_not_named(
    slow: list[dict[str, tuple[int, float]]],
) -> None:
    assert not any(intervals(RankTimes(8), slow))
