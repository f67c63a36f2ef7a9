"""A checkpoint while it is being written: all ranks put their files there, and the leader publishes it.

Ranks tell each other through the place itself, as they cannot talk behind the training: when the files of a rank are
whole, it puts down its part, `rank-00003.<attempt>.json`. The attempt is a number that all ranks agreed on before, so
that what an earlier, killed save has left is never taken for a part of this one.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.atomic_file import sync_folder, write_atomically
from data.storage import join, list_files, pieces, read_bytes, remove, upload, write_bytes
from pipeline.checkpoints.manifest import MANIFEST, rank_name, writer_of
from pipeline.checkpoints.store import WRITING, CheckpointStore, writing_name

Part = dict[str, Any]
"""What a rank wrote: `files`, name -> bytes and sha256, and `fragments`; or why it could not, as `failed`."""

_PIECE = 16 * 2**20  # bytes written at a time
_FLUSHED = 256 * 2**20  # bytes between flushes, so that the last one does not take long


class StagedCheckpoint:
    """The checkpoint of `step`, attempt number `attempt`, as `rank` sees it; `moved` is told whenever something got on.

    Its methods raise OSError, StorageDown or StorageRefused when the place fails.
    """

    def __init__(self, place: CheckpointStore, step: int, attempt: int, rank: int, moved: Callable[[], None]) -> None:
        self._place, self._step, self._rank, self._moved = place, step, rank, moved
        self._attempt = f"{attempt:012x}"
        name = writing_name(step, self._attempt)
        if place.remote:  # where this rank's files lie before they are sent
            self._folder = place.scratch / f"{name}.{rank_name(rank)}{WRITING}"
        else:
            self._folder = Path(place.location) / f"{name}{WRITING}"

    def sweep(self) -> None:
        """Remove what other attempts have left."""
        self._place.sweep((self._step, self._attempt))

    def write(self, name: str, blocks: Sequence[memoryview]) -> dict[str, Any]:
        """Put down the file `name`; returns its bytes and sha256, as they were read again from where it lies."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        entry = _write_checked(path, blocks, self._moved)
        if self._place.remote:
            upload(path, self._there(name), self._place.storage, lambda count: self._moved())
            path.unlink()
            digest = hashlib.sha256()
            for piece in pieces(self._there(name), entry["bytes"], self._place.storage):
                digest.update(piece)
                self._moved()
            _compare(self._there(name), digest.hexdigest(), entry["sha256"])
        return entry

    def clear_scratch(self) -> None:
        """Remove the folder that files of this rank were sent from."""
        if self._place.remote:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put_part(self, part: Part) -> None:
        """Tell the leader that the files of this rank are whole, or why not."""
        name, data = self._part(self._rank), json.dumps(part).encode()
        if self._place.remote:
            write_bytes(self._there(name), data, self._place.storage)
            return
        write_atomically(self._folder / name, data)

    def parts(self, ranks: Collection[int]) -> dict[int, Part]:
        """The parts of those among `ranks` that have put theirs down, once what they tell of is seen here, too."""
        sizes, found = self._sizes(), {}
        for rank in ranks:
            name = self._part(rank)
            if name in sizes:
                part = json.loads(read_bytes(self._there(name), self._place.storage))
                # A network file system may show an old size for a while.
                if all(sizes.get(file) == entry["bytes"] for file, entry in part.get("files", {}).items()):
                    found[rank] = part
        return found

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Make it a checkpoint, which has the files that the manifest names and no other."""
        data = json.dumps(manifest, indent=1).encode()
        for name in self._sizes().keys() - manifest["files"].keys():
            remove(self._there(name), self._place.storage)
            self._moved()
        if self._place.remote:
            write_bytes(self._there(MANIFEST), data, self._place.storage)
            return
        write_atomically(self._folder / MANIFEST, data)
        self._folder.rename(self._place.at(self._step))
        sync_folder(self._folder.parent)

    def discard(self) -> None:
        """Give back the room of everything."""
        if self._place.remote:
            self._place.remove(self._step, self._moved)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def discard_own(self) -> None:
        """Give back the room of what this rank has put down."""
        for name in self._sizes():
            if writer_of(name) == self._rank:
                remove(self._there(name), self._place.storage)

    def _part(self, rank: int) -> str:
        return f"{rank_name(rank)}.{self._attempt}.json"

    def _there(self, name: str) -> str:
        return join(self._place.at(self._step) if self._place.remote else self._folder, name)

    def _sizes(self) -> dict[str, int]:
        try:
            return list_files(self._there(""), self._place.storage)
        except FileNotFoundError:
            return {}


def _write_checked(path: Path, blocks: Sequence[memoryview], moved: Callable[[], None]) -> dict[str, Any]:
    """Write `blocks` down to the disk and read them again; returns bytes and sha256.

    Hashing and writing take the same pieces in turn, outside Python's lock, so that training goes on beside them.
    """
    meant, size, unflushed = hashlib.sha256(), 0, 0
    with open(path, "wb", buffering=0) as file:
        _reserve(file.fileno(), sum(map(len, blocks)))
        for block in blocks:
            for start in range(0, len(block), _PIECE):
                piece = block[start : start + _PIECE]
                meant.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
                size += len(block[start : start + _PIECE])
                unflushed += _PIECE
                if unflushed >= _FLUSHED:
                    os.fdatasync(file.fileno())
                    unflushed = 0
                moved()
        os.fsync(file.fileno())
        # Else what is read would come from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found, memory = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            found.update(memory[:count])
            moved()
    _compare(str(path), found.hexdigest(), meant.hexdigest())
    return {"bytes": size, "sha256": meant.hexdigest()}


def _reserve(descriptor: int, size: int) -> None:
    """Take the room of a file beforehand.

    One that does not fit must not fill the disk to the last byte meanwhile, where the run writes its event log, too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size))
    # Not os.posix_fallocate, which writes the whole file where the file system does not know how.
    if size and libc.fallocate(*arguments) and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(code, os.strerror(code))


def _compare(location: str, found: str, meant: str) -> None:
    if found != meant:
        raise OSError(errno.EIO, "what was read is not what had been written", location)
