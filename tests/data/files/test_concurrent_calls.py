"""Calls at the same time: how many, in which order their results are, and what an error ends."""

import threading
import time

import pytest

from data.files.concurrent_calls import call_concurrently


def test_results_are_in_the_order_of_the_items_however_calls_end() -> None:
    others = threading.Barrier(4)  # passed only if four calls run at a time

    def call(item: int) -> int:
        others.wait(60)
        return 10 * item

    assert call_concurrently(call, range(8), 4) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert call_concurrently(call, [], 4) == []


def test_no_more_calls_run_at_a_time_than_are_allowed() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def call(item: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0)
        with lock:
            running -= 1

    call_concurrently(call, range(200), 3)
    assert 1 <= most <= 3


def test_after_an_error_no_call_begins_and_those_that_have_begun_end_first() -> None:
    begun, ended, first, both_run = list[int](), list[int](), list[threading.Thread](), threading.Barrier(2)

    def call(item: int) -> None:
        begun.append(item)
        if item == 0:
            first.append(threading.current_thread())
        both_run.wait(60)
        if item == 0:
            raise OSError("the first")
        first[0].join(60)
        ended.append(item)

    with pytest.raises(OSError, match="the first"):
        call_concurrently(call, range(1000), 2)
    assert (sorted(begun), ended) == ([0, 1], [1])
    assert first[0].daemon  # or a file system that never answers would keep the process from ending
