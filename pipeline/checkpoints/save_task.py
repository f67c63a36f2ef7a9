"""One attempt to write one checkpoint, on one rank, in a background thread of training."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable

from data.errors import may_pass
from data.files.json_records import to_json
from pipeline.checkpoints.host_copy import HostFile, LiveState
from pipeline.checkpoints.manifest import CLASSES, ClassNames, FragmentEntry, Manifest, RankRecord, rank_name
from pipeline.checkpoints.staged import StagedCheckpoint
from pipeline.checkpoints.store import CheckpointStore
from pipeline.ranks.distributed import Ranks

log = logging.getLogger(__name__)

_POLL_EVERY = (0.02, 1.0)  # seconds between looks for the records of other ranks, at first and at most


class _OtherRankFailed(Exception):
    """The leader cannot publish, for a reason that another rank knows."""


class SaveTask:
    """Writes the files of this rank; the leader then waits for those of the others and publishes.

    Args:
        store: where the checkpoint goes.
        number: of the attempt, the same on all ranks.
        state: what is saved; its tensors are not read.
        files: their copy, which must not change until the thread has ended.
        ranks: of the run.
        on_end: called in the leader's thread when the checkpoint is published or abandoned.
        leftover: an attempt that failed, whose files are removed first.
    """

    def __init__(
        self,
        store: CheckpointStore,
        number: int,
        state: LiveState,
        files: dict[str, HostFile],
        ranks: Ranks,
        on_end: Callable[["SaveTask"], None],
        leftover: "SaveTask | None" = None,
    ) -> None:
        self.step = state.facts.step
        self.failure: str | None = None
        """Why this rank could not write, or on the leader why the checkpoint is not published."""
        self.is_permanent = False
        """Whether trying again will not help, as far as this rank knows."""
        self.bytes = 0
        """Of the whole checkpoint; the leader knows it after publishing."""
        self.published = False
        self.progress = 0
        """Grows while the thread makes progress."""
        self._state, self._files, self._ranks, self._on_end = state, files, ranks, on_end
        self._leftover = leftover
        self._staged = StagedCheckpoint(store, self.step, number, ranks.rank, self.note_progress)
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    @property
    def written(self) -> bool:
        """Whether this rank has written its files, or could not."""
        return self._written.is_set()

    def wait(self, seconds: float) -> None:
        """Wait until the thread has ended, for at most `seconds`."""
        self._thread.join(seconds)

    def wait_for_all(self, seconds: float) -> bool:
        """Wait until the checkpoint is published or abandoned, for at most `seconds`; returns whether it is.

        Without collectives, for the end of a run that fails: the other ranks go on writing in the background while they
        wait for this one, or are about to end as well.
        """
        deadline, pause = time.monotonic() + seconds, _POLL_EVERY[0]
        while not (settled := self._is_settled()) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_EVERY[1])
        if not settled:
            self.abandon()
        return settled

    def abandon(self) -> None:
        """Make the leader stop waiting for records that will not come, and give it a moment to do so."""
        self._abandoned.set()
        self._thread.join(2 * _POLL_EVERY[1])

    def discard_own(self) -> None:
        """Remove what this rank has left after the attempt failed."""
        self._staged.discard_own()

    def note_progress(self) -> None:
        """Count another piece of work that is done."""
        self.progress += 1

    def _is_settled(self) -> bool:
        if self.alive or self._ranks.is_leader or self.failure is not None:
            return not self.alive
        return self._staged.settled()

    def _run(self) -> None:
        record = RankRecord({}, ())
        try:
            leftover, self._leftover = self._leftover, None
            if leftover is not None:
                leftover.discard_own()
            if self._ranks.is_leader:
                self._staged.sweep()
            record = self._write()
            if not self._ranks.is_leader:
                self._staged.write_record(record)
        except Exception as error:
            self._fail(error)
            with contextlib.suppress(Exception):
                self._staged.clear_scratch()
                self._staged.discard_own()
                if not self._ranks.is_leader:
                    self._staged.write_record(RankRecord({}, (), self.failure))
        self._written.set()
        if self._ranks.is_leader:
            if self.failure is None:
                self._publish(record)
            if self.failure is not None:
                with contextlib.suppress(Exception):
                    self._staged.discard()
            self._on_end(self)

    def _write(self) -> RankRecord:
        entries = {name: self._staged.write(name, file.blocks) for name, file in self._files.items()}
        if self._ranks.is_leader and self._state.classes is not None:
            names = json.dumps(to_json(ClassNames(self._state.classes))).encode()
            entries[CLASSES] = self._staged.write(CLASSES, [memoryview(names)])
        own = f"{rank_name(self._ranks.rank)}.safetensors"
        fragments = tuple(
            FragmentEntry(f.parameter, f.start, f.stop, own) for f in self._state.fragments if f.saved_here
        )
        self._staged.clear_scratch()
        return RankRecord(entries, fragments)

    def _publish(self, own: RankRecord) -> None:
        try:
            records = {0: own} | self._collect(set(range(1, self._ranks.world_size)))
            ordered = [records[rank] for rank in range(self._ranks.world_size)]
            manifest = Manifest.of(self._state.facts, self._state.shapes, ordered)
            self._staged.publish(manifest)
            self.bytes = manifest.total_bytes
            self.published = True
        except Exception as error:
            self._fail(error)

    def _collect(self, awaited: set[int]) -> dict[int, RankRecord]:
        """The records of the ranks `awaited`: however slow they are, unless the attempt is abandoned."""
        records: dict[int, RankRecord] = {}
        pause = _POLL_EVERY[0]
        while awaited:
            abandoned = self._abandoned.is_set()
            found = self._staged.records(awaited)
            for rank, record in sorted(found.items()):
                if record.failed is not None:
                    raise _OtherRankFailed(f"rank {rank}: {record.failed}")
                self.note_progress()
                pause = _POLL_EVERY[0]
            records |= found
            awaited = awaited - found.keys()
            if awaited and abandoned:
                names = ", ".join(map(str, sorted(awaited)))
                raise _OtherRankFailed(f"no record from rank {names}; its log may show why")
            if awaited:
                self._abandoned.wait(pause)
                pause = min(2 * pause, _POLL_EVERY[1])
        return records

    def _fail(self, error: Exception) -> None:
        log.warning("checkpoint of step %d", self.step, exc_info=error)
        reason = str(error).strip().partition("\n")[0]
        # A leader that fails removes the folder in which the others still write.
        is_consequence = isinstance(error, _OtherRankFailed | FileNotFoundError)
        self.is_permanent = not is_consequence and not may_pass(error)
        self.failure = reason or type(error).__name__
