"""Timing of a rank's steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Interval:
    """The steps since the previous interval; times in seconds."""

    steps: int
    seconds: float
    step_p50: float
    step_p90: float
    step_p99: float


class StepClock:
    """Measures the steps of one rank: how long they take, wait for data, and run the forward pass.

    On a GPU the forward is timed by events in its stream, read one step later so that nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = time.perf_counter()
        self._paused = 0.0
        self._left_out = False
        self._steps: list[float] = []
        self._data_wait = self._forward = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._last_data_wait = self._last_forward = 0.0
        self._last_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The body waits for the next micro-batch."""
        began = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - began

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The body is this rank's forward pass of a micro-batch."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._forward += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The body, such as a save, does not count towards any step."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def leave_out_step(self) -> None:
        """The current step does more than others, and counts towards nothing."""
        self._left_out = True

    def step_done(self) -> None:
        """End the current step and begin the next."""
        now = time.perf_counter()
        if self._left_out:
            self._data_wait, self._forward, self._events = 0.0, 0.0, []
        else:
            self._steps.append(now - self._began - self._paused)
        self._began, self._paused, self._left_out = now, 0.0, False
        self._last_data_wait, self._last_forward, self._last_events = self._data_wait, self._forward, self._events
        self._data_wait, self._forward, self._events = 0.0, 0.0, []

    def last_step_times(self) -> tuple[float, float]:
        """Seconds of data wait and of forward in the last complete step of this rank.

        0 before there is one, and if it was left out.

        On a GPU, waits until the forwards of that step are over.
        """
        for start, end in self._last_events:
            end.synchronize()
            self._last_forward += start.elapsed_time(end) / 1e3
        self._last_events = []
        return self._last_data_wait, self._last_forward

    def contribution(self, rank: int, world_size: int) -> list[float]:
        """This rank's share of a sum over the ranks: 2 x world_size values, all data waits and then all forwards.

        All are 0 but the two of this rank. The sum is what `RankTimes.add` takes.
        """
        times = [0.0] * (2 * world_size)
        times[rank], times[world_size + rank] = self.last_step_times()
        return times

    def interval(self) -> Interval | None:
        """The steps since the last call; None if there were none, or all of them were left out."""
        if not self._steps:
            return None
        p50, p90, p99 = np.percentile(self._steps, [50, 90, 99]).tolist()
        interval = Interval(len(self._steps), sum(self._steps), p50, p90, p99)
        self._steps = []
        return interval
