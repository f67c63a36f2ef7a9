"""One failure, by arithmetic that can be done by hand, and the rules of the program that it repeats."""

from dataclasses import replace

import pytest

from pipeline.checkpoints import saver
from pipeline.errors import ConfigError
from pipeline.planner.cluster import bundled_cluster_figures
from pipeline.planner.failures import node_failure, rank_failure, stop_by_signal
from pipeline.planner.run_timing import Ending, RunTiming, SaveCost, save_cost, start_seconds
from pipeline.recipe.sections import WatchdogSettings

RUN = RunTiming(nodes=64, ranks_per_node=8, batch=4096, step=0.5, interval=1000, save=SaveCost(2.0, 100.0), start=60.0)
FIGURES = bundled_cluster_figures()


def test_a_node_that_dies_with_a_save_in_flight_throws_the_run_back_to_the_save_before() -> None:
    found = node_failure(RUN, 17, 12_345, in_flight=True)
    assert found.ranks == range(136, 144)
    assert found.in_flight is not None
    assert found.in_flight.step == 12_000
    assert (found.continues_from, found.lost_steps, found.lost_samples) == (11_000, 1345, 1345 * 4096)
    # The steps, and the save of step 12,000 again.
    assert found.redone_seconds == 1345 * 0.5 + 2.0
    assert (found.notice_seconds, found.requeue_seconds, found.start_seconds) == (300.0, 120.0, 60.0)
    assert found.seconds == 300 + 120 + 60 + 1345 * 0.5 + 2


def test_a_save_is_in_flight_as_long_as_it_is_written() -> None:
    after, before = node_failure(RUN, 0, 12_200), node_failure(RUN, 0, 12_199)
    assert after.in_flight is None
    assert after.continues_from == 12_000
    assert before.in_flight is not None
    assert before.in_flight.seconds_left == 0.5
    assert before.continues_from == 11_000


def test_the_first_save_has_none_before() -> None:
    found = node_failure(RUN, 0, 1001)
    assert found.in_flight is not None
    assert found.continues_from == 0
    assert node_failure(RUN, 0, 999, in_flight=True).in_flight is None


def test_slurm_ends_the_job_of_a_dead_node_unless_a_watchdog_is_quicker() -> None:
    assert node_failure(RUN, 0, 500).exit_code is None
    quick = replace(RUN, watchdog=WatchdogSettings(least_seconds=30))
    found = node_failure(quick, 0, 500)
    assert (found.exit_code, found.notice_seconds) == (75, 30 + 1 + 20)


def test_a_step_may_take_a_multiple_of_the_longest_one() -> None:
    assert replace(RUN, step=60.0).watchdog_limit == 600
    assert RUN.watchdog_limit == 300


def test_ranks_that_lost_another_wait_for_a_save_in_flight_alone() -> None:
    assert rank_failure(RUN, 9, 12_345).notice_seconds == 2
    saving = rank_failure(RUN, 9, 12_001)
    assert (saving.notice_seconds, saving.ranks, saving.exit_code) == (12, range(9, 10), 75)
    assert saving.continues_from == 11_000


def test_a_save_goes_on_while_a_training_thread_hangs() -> None:
    found = rank_failure(RUN, 9, 12_001, ending=Ending.HANG)
    assert found.in_flight is not None
    assert found.in_flight.saved_in_time
    assert (found.continues_from, found.lost_steps, found.notice_seconds) == (12_000, 1, 321)
    slow = replace(RUN, interval=100_000, save=SaveCost(2.0, 1000.0))
    assert rank_failure(slow, 9, 100_001, ending=Ending.HANG).continues_from == 0


def test_a_signal_loses_nothing() -> None:
    found = stop_by_signal(RUN, 12_345)
    assert (found.lost_steps, found.continues_from, found.exit_code) == (0, 12_346, 75)
    assert found.notice_seconds == 0.5 + 2 + 100
    assert found.seconds == 102.5 + 120 + 60


def test_a_signal_loses_what_cannot_be_saved_in_its_time() -> None:
    found = stop_by_signal(RUN, 12_100)  # 50 s of the save in flight, and 102 of another, are more than 120
    assert found.in_flight is not None
    assert found.in_flight.saved_in_time
    assert (found.continues_from, found.lost_steps, found.notice_seconds) == (12_000, 100, 120)
    found = stop_by_signal(replace(RUN, grace=40.0), 12_100)
    assert (found.continues_from, found.lost_steps) == (11_000, 1100)


def test_nodes_and_ranks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="node 64: the run has 64, numbered from 0 to 63"):
        node_failure(RUN, 64, 1)
    with pytest.raises(ConfigError, match="rank -1"):
        rank_failure(RUN, -1, 1)
    with pytest.raises(ConfigError, match="step -1"):
        stop_by_signal(RUN, -1)
    with pytest.raises(ConfigError, match=r"interval: 0 is less than 1"):
        replace(RUN, interval=0)
    with pytest.raises(ConfigError, match=r"step: 0 is no number of seconds"):
        replace(RUN, step=0)


def test_training_waits_for_a_write_that_takes_longer_than_the_steps() -> None:
    assert (RUN.cycle, RUN.write_binds) == (502.0, False)
    slow = replace(RUN, save=SaveCost(2.0, 700.0))
    assert (slow.cycle, slow.write_binds) == (702.0, True)


def test_patience_is_that_of_the_program() -> None:
    assert FIGURES.failures.lost_rank_patience.value == saver._LOST_RANK_PATIENCE


def test_a_save_takes_its_bytes_on_the_busiest_part() -> None:
    saves = FIGURES.saves
    alone = save_cost(8e9, 1, 8)
    assert alone.stall == saves.agreement.value + 8e9 / saves.copy_bandwidth.value
    assert alone.write == pytest.approx(8e9 / saves.hash_bandwidth.value + 3 * saves.file_seconds.value)
    node = save_cost(64e9, 8, 8)  # the same for each rank; now the node's disk is slower than its cores
    assert node.stall == alone.stall
    moved = 64e9 / saves.node_write_bandwidth.value + 64e9 / saves.node_read_bandwidth.value
    assert node.write == pytest.approx(moved + (8 + 2) * saves.file_seconds.value)
    remote = save_cost(8e9, 1000, 8, remote=True)
    assert remote.write > 3000 * saves.request_processor_seconds.value


def test_a_start_reads_its_state_and_its_index() -> None:
    plain = start_seconds(0, 8, 8)
    assert start_seconds(0, 8, 8, shards=1000) == pytest.approx(
        plain + 1000 * 2e-5 + 1000 / FIGURES.limits.file_operations.value
    )
    assert start_seconds(0, 8, 8, compiled=True) == plain + FIGURES.starts.compile.value
    assert start_seconds(8e9, 8, 8) == plain + 8e9 / FIGURES.saves.node_read_bandwidth.value
    assert start_seconds(0, 8, 8, parameters=10**9) == pytest.approx(plain + 7)
