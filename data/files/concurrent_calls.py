"""Many calls that wait for a file system or a server, several at a time."""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def call_concurrently(function: Callable[[Item], Result], items: Iterable[Item], calls: int) -> list[Result]:
    """The results of `function` for all `items`, in their order, with at most `calls` calls at a time.

    When a call fails no others begin, and those that have begun end before the error is raised; of several errors, that
    of the first item. The threads are daemons, unlike those of `concurrent.futures`: a file system that never answers
    keeps no process from ending.
    """
    pending = list(items)
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    numbers, lock, stopped = iter(range(len(pending))), threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                results[number] = function(pending[number])
            except BaseException as error:
                errors[number] = error
                stopped.set()

    threads = [threading.Thread(target=work, name="call", daemon=True) for _ in range(min(calls, len(pending)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopped.set()  # this thread may have been interrupted
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(pending))]
