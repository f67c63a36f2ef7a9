"""Verification of local shards behind a run: a thread of low priority compares the sha256 of each with the index.

Remote shards are verified as they are downloaded. Local ones are read in place, by sample, so that a flipped bit in the
pixels or in a label goes unnoticed unless the whole file is hashed.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple, Self

from data.dataset import Dataset
from data.errors import DataError, StorageDown
from data.remote.storage import is_remote

log = logging.getLogger(__name__)

_NICENESS = 19
# The thread needs the interpreter lock between pieces. With small ones, the training thread would often wait until a
# busy node gives this one its turn.
_PIECE = 16 * 2**20
_PATIENCE = 600.0  # seconds for one piece
_CLOSING = 10.0  # seconds


class LocalShard(NamedTuple):
    """A shard on a local disk or a mounted file system, and what the index says about it."""

    path: str
    bytes: int
    sha256: str


class FileState(NamedTuple):
    """What changes when a file is written; the time of its last change (ctime) cannot be set back."""

    path: str
    bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> Self:
        """The state of the file at `path`."""
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def local_shards(dataset: Dataset, numbers: Iterable[int]) -> list[LocalShard]:
    """The shards `numbers` of `dataset`; none if they are remote."""
    index = dataset.index
    if is_remote(index.folder):
        return []
    entries = ((index.location(number), index.shards[number]) for number in numbers)
    return [LocalShard(path, entry.bytes, entry.sha256) for path, entry in entries]


def unverified(shards: Iterable[LocalShard], known: Mapping[FileState, str]) -> list[LocalShard]:
    """Those of `shards` whose files, by the sha256 that are `known` of them, are not the indexed ones for certain.

    Those known to be others come first.
    """
    left, damaged = [], []
    for shard in shards:
        found = None
        with suppress(OSError):  # reading it reports the error
            found = known.get(FileState.of(shard.path, os.stat(shard.path)))
        if found is None:
            left.append(shard)
        elif found != shard.sha256:
            damaged.append(shard)
    return damaged + left


class ShardVerifier:
    """A thread that hashes `shards` one after another.

    Args:
        shards: in the order in which they are hashed.
        record: called in the thread with the state and sha256 of each file that was hashed.
    """

    def __init__(self, shards: list[LocalShard], record: Callable[[FileState, str], None]) -> None:
        self._shards, self._record = shards, record
        self._failure: Exception | None = None
        self._closed, self._ended = threading.Event(), threading.Event()
        self._reading, self._progress = "", time.monotonic()
        self._thread: threading.Thread | None = None
        if shards:
            self._thread = threading.Thread(target=self._run, name="shard verifier", daemon=True)
            self._thread.start()
        else:
            self._ended.set()

    @property
    def running(self) -> bool:
        """Whether shards are left. Once it is False, `check` has the final result."""
        return not self._ended.is_set()

    def check(self) -> None:
        """Report what the thread has found.

        Raises:
            DataError: a shard is missing, or is not the indexed one in two readings.
            StorageDown: one cannot be read.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float) -> None:
        """Wait until no shards are left, but not longer than `seconds`.

        Raises:
            StorageDown: nothing could be read for ten minutes.
        """
        if not self._ended.wait(seconds) and time.monotonic() - self._progress > _PATIENCE:
            raise StorageDown(
                f"shard {self._reading}: nothing could be read of it for {_PATIENCE:,.0f} s; repeat the command when "
                "its file system answers again"
            )

    def close(self) -> None:
        """Stop the thread after its current piece, which a file system that hangs may never return."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSING)

    def _run(self) -> None:
        try:
            # In Linux the priority belongs to the thread, and that of its reads follows.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            buffer = memoryview(bytearray(min(_PIECE, max(1, *(shard.bytes for shard in self._shards)))))
            for shard in self._shards:
                self._verify(shard, buffer)
        except _Closed:
            pass
        except Exception as error:
            self._failure = error
        finally:
            self._ended.set()

    def _verify(self, shard: LocalShard, buffer: memoryview) -> None:
        state, found = self._hash(shard.path, buffer, from_disk=False)
        if found != shard.sha256:
            # A bit may flip on the way from the disk; the page cache would only repeat it.
            state, found_again = self._hash(shard.path, buffer, from_disk=True)
            if found_again == shard.sha256:
                log.warning(
                    "shard %s was read with the sha256 %s..., and then with that of the index: this node may have read "
                    "damaged samples; its memory or the way to the disk is faulty", shard.path, found[:16],
                )  # fmt: skip
            found = found_again
        self._record(state, found)
        if found != shard.sha256:
            raise DataError(
                f"shard {shard.path}: read twice, and its sha256 is {found[:16]}..., not {shard.sha256[:16]}... as in "
                "the index, so it is damaged or another file, and samples of it may have been used; copy the shard "
                "again, or index the shards again with: coatnet shards index"
            )

    def _hash(self, path: str, buffer: memoryview, *, from_disk: bool) -> tuple[FileState, str]:
        """State and sha256 of the file at `path`; `from_disk` drops its pages from the page cache first."""
        self._reading, digest = path, hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                state = FileState.of(path, os.fstat(file.fileno()))
                if from_disk:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while size := file.readinto(buffer):
                    digest.update(buffer[:size])
                    self._progress = time.monotonic()
                    if self._closed.is_set():
                        raise _Closed
        except FileNotFoundError:
            raise DataError(f"shard {path}: it has been removed since the run started; copy it back") from None
        except PermissionError:
            raise DataError(f"shard {path}: permission denied; allow this user to read it") from None
        except OSError as error:
            raise StorageDown(
                f"shard {path}: cannot be read ({error.strerror}); repeat the command, and if it happens again, "
                "copy the shard to another disk"
            ) from error
        return state, digest.hexdigest()


class _Closed(Exception):
    """The thread is to stop."""
