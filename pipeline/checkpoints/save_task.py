"""One attempt to write one checkpoint, on one rank, in a thread behind the training."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from pipeline.checkpoints.host_copy import HostFile, LiveState
from pipeline.checkpoints.manifest import rank_name, total_bytes, whole_manifest
from pipeline.checkpoints.staged import Part, StagedCheckpoint
from pipeline.checkpoints.store import CheckpointStore
from pipeline.distributed import Ranks

log = logging.getLogger(__name__)

_LOOK_EVERY = (0.02, 1.0)  # seconds between looks for the parts of other ranks, at first and at most
_PARTS_LIMIT = 1800.0  # seconds without a new part after which the leader gives up


class SaveTask:
    """Writes the files of this rank; the leader then waits for those of the others and publishes.

    Args:
        place: of the checkpoints.
        number: of the attempt, the same on all ranks.
        state: what the checkpoint is of; its tensors are not looked at.
        files: their copy, which must stay as it is until the thread has ended.
        ranks: of the run.
        ended: called in the leader's thread when the checkpoint is published or given up.
        leftover: an attempt that failed, whose room is given back first.
    """

    def __init__(
        self,
        place: CheckpointStore,
        number: int,
        state: LiveState,
        files: dict[str, HostFile],
        ranks: Ranks,
        ended: Callable[["SaveTask"], None],
        leftover: "SaveTask | None" = None,
    ) -> None:
        self.step = int(state.facts["step"])
        self.failure: str | None = None
        """Why this rank could not write, or on the leader why the checkpoint is not published."""
        self.bytes = 0
        """Of the whole checkpoint; known to the leader once it is published."""
        self.published = False
        self._state, self._files, self._ranks, self._ended = state, files, ranks, ended
        self._leftover = leftover
        self._draft = StagedCheckpoint(place, self.step, number, ranks.rank, self.move)
        self._written, self._given_up = threading.Event(), threading.Event()
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def wait_written(self, patience: float) -> bool:
        """Wait until this rank's files are whole; False when they cannot be, or nothing moves for so many seconds."""
        return self._wait(self._written.is_set, patience) and self.failure is None

    def wait_published(self, patience: float) -> bool:
        """Wait until the thread has ended, as above; whether the checkpoint is published, which the leader knows."""
        if not self._wait(lambda: not self.alive, patience):
            self.give_up()
            self._wait(lambda: not self.alive, patience=2 * _LOOK_EVERY[1])
        return self.published

    def give_up(self) -> None:
        """Have the leader stop waiting for parts that will not come."""
        self._given_up.set()

    def discard_own(self) -> None:
        """Give back the room of what this rank has left after the attempt failed."""
        self._draft.discard_own()

    def _wait(self, condition: Callable[[], bool], patience: float) -> bool:
        while not condition():
            if time.monotonic() - self._moved > patience:
                return False
            self._thread.join(0.01)
        return True

    def move(self) -> None:
        """Something got on."""
        self._moved = time.monotonic()

    def _run(self) -> None:
        part: Part = {}
        try:
            leftover, self._leftover = self._leftover, None
            if leftover is not None:
                leftover.discard_own()
            if self._ranks.is_leader:
                self._draft.sweep()
            part = self._write()
            if not self._ranks.is_leader:
                self._draft.put_part(part)
        except Exception as error:
            self._fail(error)
            with contextlib.suppress(Exception):
                self._draft.clear_scratch()
                self._draft.discard_own()
                if not self._ranks.is_leader:
                    self._draft.put_part({"failed": self.failure})
        self._written.set()
        if self._ranks.is_leader:
            if self.failure is None:
                self._publish(part)
            if self.failure is not None:
                with contextlib.suppress(Exception):
                    self._draft.discard()
            self._ended(self)

    def _write(self) -> Part:
        entries = {name: self._draft.write(name, file.blocks) for name, file in self._files.items()}
        own = f"{rank_name(self._ranks.rank)}.safetensors"
        fragments = [
            {"parameter": f.parameter, "start": f.start, "stop": f.stop, "file": own}
            for f in self._state.fragments
            if f.saved_here
        ]
        self._draft.clear_scratch()
        return {"files": entries, "fragments": fragments}

    def _publish(self, own: Part) -> None:
        try:
            parts = {0: own} | self._collect(set(range(1, self._ranks.world_size)))
            ordered = [parts[rank] for rank in range(self._ranks.world_size)]
            manifest = whole_manifest(self._state.facts, self._state.shapes, ordered)
            self._draft.publish(manifest)
            self.bytes = total_bytes(manifest)
            self.published = True
        except Exception as error:
            self._fail(error)

    def _collect(self, awaited: set[int]) -> dict[int, Part]:
        parts: dict[int, Part] = {}
        pause, deadline = _LOOK_EVERY[0], time.monotonic() + _PARTS_LIMIT
        while awaited:
            given_up = self._given_up.is_set()
            found = self._draft.parts(awaited)
            for rank, part in sorted(found.items()):
                if "failed" in part:
                    raise OSError(f"rank {rank}: {part['failed']}")
                self.move()
                pause, deadline = _LOOK_EVERY[0], time.monotonic() + _PARTS_LIMIT
            parts |= found
            awaited = awaited - found.keys()
            if awaited and (given_up or time.monotonic() > deadline):
                names = ", ".join(map(str, sorted(awaited)))
                raise OSError(f"nothing came from rank {names}, whose log may say why")
            if awaited:
                self._given_up.wait(pause)
                pause = min(2 * pause, _LOOK_EVERY[1])
        return parts

    def _fail(self, error: Exception) -> None:
        log.warning("checkpoint of step %d", self.step, exc_info=error)
        reason = str(error).strip().partition("\n")[0]
        self.failure = reason or type(error).__name__
