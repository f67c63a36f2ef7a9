"""Saves in the background: training waits for the copy from the device, and a thread does the rest."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from data.errors import CoatnetError, StorageDown
from pipeline.checkpoints.host_copy import HostCopy, LiveState
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.manifest import step_name
from pipeline.checkpoints.retention import accuracies, prune
from pipeline.checkpoints.save_task import SaveTask
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import RunFailed
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

_GIVE_UP_AFTER = 120.0  # seconds without an answer from a remote store, for one request
_LOST_RANK_PATIENCE = 10.0  # for the save in flight, when another rank is gone; less than KillWait of Slurm, 30 s
_EXCHANGE_EVERY = 1.0  # seconds, while ranks wait for a save
PATIENCE = 180.0
"""Seconds of waiting without progress of any rank after which a save is considered hung. Uploads give up earlier."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How a save went, as the leader sees it."""

    step: int
    checkpoint: str
    """`step-...`."""
    stall: float
    """Seconds that training waited."""
    seconds: float
    """From the call until the checkpoint was published or abandoned."""
    bytes: int
    """Of all files; 0 if it was abandoned."""
    failure: str | None
    """Why it was abandoned."""


class Saver:
    """The checkpoints of one start of a run; all ranks call its methods in the same order.

    At most one save is in flight. A failed one is recorded in the event log, its unfinished files are removed, and the
    next save tries again; checkpoints are removed only after a newer one is published.

    Args:
        store: where they go.
        folder: of the run, for the event log.
        settings: which are kept.
        ranks: of the run.
        newest: name of the newest checkpoint, from which the run continues; None without one.
        patience: seconds of waiting without progress of any rank after which a save is considered hung.
        error_patience: seconds for which the save in flight may go on when the run ends with an error.
        section: entered for every few seconds of waiting, so that a watchdog sees that the ranks exchange something.
        on_published: called with the name of each published checkpoint, in the leader's thread.

    Raises:
        ConfigError: the leader cannot write the store.
        StorageDown, StorageRefused: the leader cannot read the remote store.
    """

    def __init__(
        self,
        store: CheckpointStore,
        folder: RunFolder,
        settings: CheckpointSettings,
        ranks: Ranks,
        *,
        newest: str | None = None,
        patience: float = PATIENCE,
        error_patience: float = PATIENCE,
        section: Callable[[], AbstractContextManager[None]] = nullcontext,
        on_published: Callable[[str], None] = lambda name: None,
    ) -> None:
        # Shorter than for data: a save that fails is tried again.
        storage = replace(store.storage, give_up_after=min(store.storage.give_up_after, _GIVE_UP_AFTER))
        self._store = replace(store, storage=storage)
        self._folder, self._settings, self._ranks = folder, settings, ranks
        self.newest = newest
        """Name of the newest checkpoint that all ranks know to be complete, the same on all of them."""
        self._patience, self._error_patience = patience, error_patience
        self._section, self._on_published = section, on_published
        self._copy = HostCopy(ranks)
        self._latest: LiveState | None = None
        self._attempt: SaveTask | None = None
        self._published: bool | None = None
        """Whether the last attempt was published, once all ranks have agreed on it."""
        self._reason, self._is_permanent = "", False
        self._reports: deque[SaveReport] = deque()
        store.scratch.mkdir(parents=True, exist_ok=True)
        if ranks.is_leader:
            store.check()
            CheckpointLocations.save(folder, store, settings)
            store.sweep()
        elif store.remote:
            store.sweep_scratch()

    def save(self, state: LiveState) -> float:
        """Begin to save `state`; returns the seconds that training waited.

        It waits for the end of the save before, and for the copy of `state` to host memory. A second call for one step
        does nothing.
        """
        same = self._attempt is not None and self._attempt.step == state.facts.step
        return 0.0 if same and self._published is not False else self._begin(state)

    def finish(self) -> bool:
        """Wait for the save in flight; returns whether the last one is published, and True if there was none."""
        if not self._is_saved:
            self._agree()
        return self._is_saved

    def finish_or_retry(self, attempts: int = 3, pause: float = 10.0) -> None:
        """Wait until the last save is published; if it fails, try again after `pause` seconds.

        For the end of a stage: the state must still be what it was at that save.

        Raises:
            RunFailed: all attempts failed, the last one for a reason that will not pass.
            StorageDown: the last one failed because the store does not work at the moment.
        """
        for number in range(attempts):
            if number > 0 and self._latest is not None:
                time.sleep(pause)
                self._begin(self._latest)
            if self.finish():
                return
        what = f"{self._store.location}: the last checkpoint could not be saved in {attempts} attempts"
        again = f"continues from {self.newest}" if self.newest else "starts over"
        if self._is_permanent:
            raise RunFailed(f"{what} ({self.why_unsaved()}); fix the cause and repeat the command: it {again}")
        error = StorageDown(f"{what} ({self.why_unsaved()})")
        error.if_repeated = f"the same command {again}"
        raise error

    @property
    def in_flight(self) -> int | None:
        """The step whose save may not have ended yet, the same on all ranks."""
        return self._attempt.step if self._attempt is not None and self._published is None else None

    def why_unsaved(self) -> str:
        """Why the last save failed; all ranks call this."""
        return self._ranks.broadcast_text(0, self._reason or "a rank hangs while writing it")

    @property
    def location(self) -> str:
        """Folder or URL of the checkpoints."""
        return self._store.location

    def reports(self) -> list[SaveReport]:
        """The saves that ended since the last call, in order; on the leader."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the save in flight end on all ranks, unless a person or a signal interrupts this process.

        The first rank that ends takes the others with it, and what they have not written yet is lost.
        """
        if self._attempt is None or self._published is not None or not (kind is None or issubclass(kind, Exception)):
            return
        another_is_gone = isinstance(error, CoatnetError) and error.is_consequence
        if not self._attempt.wait_for_all(_LOST_RANK_PATIENCE if another_is_gone else self._error_patience):
            log.warning("the checkpoint of step %d was not complete in time and is lost", self._attempt.step)

    @property
    def _is_saved(self) -> bool:
        """Whether the latest state is published, as far as all ranks have agreed."""
        latest = self._latest.facts.step if self._latest is not None else None
        return latest is None or (bool(self._published) and self._attempt is not None and self._attempt.step == latest)

    def _begin(self, state: LiveState) -> float:
        began, step = time.monotonic(), state.facts.step
        self._latest = state
        number = self._agree()
        if self._is_saved:  # an attempt that was given up has been published after all
            return time.monotonic() - began
        if number == 0:
            # Its memory is still being read. If that write succeeds late after all, no harm is done.
            stall = time.monotonic() - began
            self._report_failure(step, began, stall, "a rank still hangs in an earlier save")
            return stall
        leftover = self._attempt if self._published is False else None
        self._copy.fill(state)
        stall = time.monotonic() - began
        self._published, self._reason = None, ""
        self._attempt = SaveTask(
            self._store,
            number,
            state,
            self._copy.files,
            self._ranks,
            on_end=partial(self._report_end, began=began, stall=stall),
            leftover=leftover,
        )
        return stall

    def _agree(self) -> int:
        """Wait for the attempt in flight, and agree with all ranks on its outcome.

        Returns the number of the next attempt, or 0 when a rank's thread has not ended.
        """
        attempt = self._attempt
        if attempt is not None and self._published is None:
            self._wait(attempt)
        number = secrets.randbits(47) + 1 if self._ranks.is_leader else 0
        outcome = (attempt.published, attempt.alive, attempt.is_permanent) if attempt is not None else (False,) * 3
        published, hanging, permanent, number = self._sum(*outcome, number)
        if attempt is not None:
            self._published, self._is_permanent = bool(published), bool(permanent)
            self.newest = step_name(attempt.step) if published else self.newest
        return 0 if hanging else number

    def _wait(self, attempt: SaveTask) -> None:
        """Wait until the attempt has ended on all ranks, or none of them makes progress any more."""
        pause, quiet, progress = min(_EXCHANGE_EVERY, self._patience / 4), 0.0, attempt.progress
        while True:
            with self._section():
                attempt.wait(pause)
                before, progress = progress, attempt.progress
                running, writing, failed, moved = self._sum(
                    attempt.alive, not attempt.written, attempt.failure is not None, progress > before
                )
            if not running:
                return
            quiet = 0.0 if moved else quiet + pause
            # A rank whose disk is gone cannot write a record of its failure either.
            if quiet >= self._patience or (failed and not writing):
                attempt.abandon()
            if quiet >= self._patience:
                return

    def _sum(self, *numbers: int) -> list[int]:
        """Their sums over all ranks."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self._ranks.device)
        return [int(number) for number in self._ranks.sum(tensor).tolist()]

    def _report_end(self, attempt: SaveTask, began: float, stall: float) -> None:
        """In the leader's thread: record the outcome, and remove old checkpoints."""
        if not attempt.published:
            self._report_failure(attempt.step, began, stall, attempt.failure or "")
            return
        name, seconds = step_name(attempt.step), time.monotonic() - began
        self._on_published(name)
        self._reports.append(SaveReport(attempt.step, name, stall, seconds, attempt.bytes, None))
        self._record(Event.SAVE, step=attempt.step, checkpoint=name, seconds=round(seconds, 3), bytes=attempt.bytes)
        try:
            top1 = accuracies(self._folder.events.entries()) if self._settings.keep_best else {}
            prune(self._store, self._settings, top1, attempt.note_progress)
        except Exception as error:
            log.warning("old checkpoints could not be removed", exc_info=error)
            self._record(Event.REMOVAL_FAILED, reason=str(error))

    def _report_failure(self, step: int, began: float, stall: float, reason: str) -> None:
        self._reason = reason
        if self._ranks.is_leader:
            seconds = time.monotonic() - began
            self._reports.append(SaveReport(step, step_name(step), stall, seconds, 0, reason))
            self._record(Event.SAVE_FAILED, step=step, reason=reason)

    def _record(self, event: Event, **facts: Any) -> None:
        with suppress(OSError):  # the disk of the run folder may be the one that is full
            self._folder.events.record(event, **facts)
