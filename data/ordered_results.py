"""Work in threads, delivered in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def results_in_order(tasks: Iterator[Callable[[], Result]], workers: int, stop: Callable[[], None]) -> Iterator[Result]:
    """Run `tasks` in `workers` threads, at most twice as many ahead of the consumer, and yield their results in order.

    `stop` is called at the end, whatever the reason: it must end every wait in a task.
    """
    executor = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop()
        executor.shutdown(wait=True, cancel_futures=True)
