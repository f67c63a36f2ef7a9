"""Where the time of a rank's steps goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Interval:
    """The steps since the last look at the clock; times in seconds."""

    steps: int
    seconds: float
    step_p50: float
    step_p90: float
    step_p99: float


class StepClock:
    """Measures the steps of one rank: how long they take, wait for data and compute forward.

    On a GPU the forward is measured by events in its stream, read a step later, so that nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = time.perf_counter()
        self._aside = 0.0
        self._steps: list[float] = []
        self._waited = self._computed = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._last_waited = self._last_computed = 0.0
        self._last_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """What happens inside is waiting for the next micro-batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What happens inside is this rank's own forward of a micro-batch."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._computed += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside, such as a save, belongs to no step."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def step_done(self) -> None:
        """A step is done, and the next one begins."""
        now = time.perf_counter()
        self._steps.append(now - self._began - self._aside)
        self._began, self._aside = now, 0.0
        self._last_waited, self._last_computed, self._last_events = self._waited, self._computed, self._events
        self._waited, self._computed, self._events = 0.0, 0.0, []

    def last_step_times(self) -> tuple[float, float]:
        """Seconds that the last finished step waited for data and computed forward on this rank; 0 before there is one.

        On a GPU, returns when the forwards of that step are over.
        """
        for start, end in self._last_events:
            end.synchronize()
            self._last_computed += start.elapsed_time(end) / 1e3
        self._last_events = []
        return self._last_waited, self._last_computed

    def contribution(self, rank: int, world_size: int) -> list[float]:
        """`last_step_times` in this rank's places of 2 x world_size zeros: all data waits, then all forwards.

        The sum over the ranks is what `RankTimes.add` takes.
        """
        slots = [0.0] * (2 * world_size)
        slots[rank], slots[world_size + rank] = self.last_step_times()
        return slots

    def interval(self) -> Interval | None:
        """The steps since the last call; None if there was none."""
        if not self._steps:
            return None
        p50, p90, p99 = np.percentile(self._steps, [50, 90, 99]).tolist()
        interval = Interval(len(self._steps), sum(self._steps), p50, p90, p99)
        self._steps = []
        return interval
