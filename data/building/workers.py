"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TypeVar

from data.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """`processes` worker processes, started for the second task: a single task is faster in this process."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._alive: Connection | None = None

    def results(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """`function` of every task, in the order of completion; tasks are taken only as workers become free.

        Raises:
            DataError: a worker process died.
        """
        remaining = iter(tasks)
        first = list(islice(remaining, 2))
        if self._processes == 1 or len(first) < 2:
            for task in chain(first, remaining):
                yield function(task)
            return
        executor = self._start()
        waiting: set[Future[Result]] = set()
        try:
            for task in chain(first, remaining):
                waiting.add(executor.submit(function, task))
                if len(waiting) > self._processes:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, perhaps for lack of memory; the same command continues, with fewer "
                "--processes if memory is scarce"
            ) from error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is None or self._alive is None:
            return
        if error is not None:
            self._alive.close()
        self._executor.shutdown(cancel_futures=True)
        self._alive.close()

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy held locks
            ours, self._alive = context.Pipe(duplex=False)
            self._executor = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_end_with, initargs=(ours,)
            )
        return self._executor


def _end_with(starter: Connection) -> None:
    """End this process when the other end of `starter` closes, even because that process is killed."""

    def watch() -> None:
        try:
            starter.recv()
        except EOFError:
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the starter handles it
    threading.Thread(target=watch, daemon=True).start()
