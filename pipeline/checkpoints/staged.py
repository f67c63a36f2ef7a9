"""A checkpoint while it is being written: all ranks write their files, and the leader publishes it.

Ranks communicate through the store itself, since collectives belong to the training that goes on meanwhile: when the
files of a rank are complete, it writes its record, `rank-00003.<attempt>.json`. All ranks agreed on the number of the
attempt before, so that leftovers of an earlier, killed save are never taken for a part of this one.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from data.errors import StorageDown, StorageRefused
from data.files.atomic_file import sync_folder, write_atomically
from data.files.concurrent_calls import call_concurrently
from data.files.file_sizes import regular_files, regular_size
from data.files.json_records import parse_json, to_json
from data.remote.storage import (
    CONCURRENT_QUESTIONS,
    join,
    list_files,
    pieces,
    read_bytes,
    remove,
    upload,
    write_bytes,
)
from pipeline.checkpoints.manifest import MANIFEST, FileEntry, Manifest, RankRecord, rank_name, step_name, writer_of
from pipeline.checkpoints.store import WRITING, CheckpointStore, writing_name

log = logging.getLogger(__name__)

_PIECE = 16 * 2**20  # bytes written at a time
_FLUSHED = 256 * 2**20  # bytes between flushes, so that the last one is short


class StagedCheckpoint:
    """The checkpoint of `step`, attempt number `attempt`, as `rank` sees it; `on_progress` is called after each piece.

    Its methods raise OSError, StorageDown or StorageRefused when the store fails.
    """

    def __init__(
        self, store: CheckpointStore, step: int, attempt: int, rank: int, on_progress: Callable[[], None]
    ) -> None:
        self._store, self._step, self._rank, self._on_progress = store, step, rank, on_progress
        self._attempt = f"{attempt:012x}"
        name = writing_name(step, self._attempt)
        if store.remote:  # where this rank's files are kept until they are sent
            self._folder = store.scratch / f"{name}.{rank_name(rank)}{WRITING}"
        else:
            self._folder = Path(store.location) / f"{name}{WRITING}"

    def sweep(self) -> None:
        """Remove the leftovers of other attempts."""
        self._store.sweep((self._step, self._attempt))

    def write(self, name: str, blocks: Sequence[memoryview]) -> FileEntry:
        """Write the file `name`, and verify it by reading it back from the store."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        entry = _write_verified(path, blocks, self._on_progress)
        if self._store.remote:
            upload(path, self._at(name), self._store.storage, lambda count: self._on_progress())
            path.unlink()
            digest = hashlib.sha256()
            for piece in pieces(self._at(name), entry.bytes, self._store.storage):
                digest.update(piece)
                self._on_progress()
            _compare(self._at(name), digest.hexdigest(), entry.sha256)
        return entry

    def clear_scratch(self) -> None:
        """Remove the local folder that files of this rank were sent from."""
        if self._store.remote:
            shutil.rmtree(self._folder, ignore_errors=True)

    def write_record(self, record: RankRecord) -> None:
        """Report to the leader that the files of this rank are complete, or why not."""
        name, data = self._record_name(self._rank), json.dumps(to_json(record)).encode()
        if self._store.remote:
            # A manifest that is there before is of an earlier attempt, and the leader still needs the record.
            published_before = self._exists(MANIFEST)
            write_bytes(self._at(name), data, self._store.storage)
            # If the answer to a request is lost, the leader may publish before the request is repeated.
            if not published_before and self._exists(MANIFEST):
                remove(self._at(name), self._store.storage)
            return
        write_atomically(self._folder / name, data)

    def records(self, ranks: Collection[int]) -> dict[int, RankRecord]:
        """The records of those among `ranks` that have written theirs, once the files in them are visible here, too."""
        listed = self._listed()

        def read(rank: int) -> RankRecord | None:
            record = parse_json(RankRecord, read_bytes(self._at(self._record_name(rank)), self._store.storage))
            # A network file system may show an old size for a while.
            if any(self._size(file, listed) != entry.bytes for file, entry in record.files.items()):
                return None
            self._on_progress()
            return record

        written = [rank for rank in ranks if self._record_name(rank) in listed]
        read_now = zip(written, call_concurrently(read, written, CONCURRENT_QUESTIONS), strict=True)
        return {rank: record for rank, record in read_now if record is not None}

    def publish(self, manifest: Manifest) -> None:
        """Make it a checkpoint with the files that the manifest names and no others.

        A published one with the same manifest is accepted: an earlier attempt may have seen an error, or been given up,
        although it succeeded.
        """
        data = json.dumps(manifest.as_json(), indent=1).encode()
        self._remove_others(manifest)
        try:
            self._make_visible(data)
        except (OSError, StorageDown):
            if not self._is_published(data):
                raise
        if not self._store.remote:
            shutil.rmtree(self._folder, ignore_errors=True)  # what is left of it if it was published already
            sync_folder(self._folder.parent)
            return
        try:
            self._remove_others(manifest)  # records that came again before the manifest, see `write_record`
        except (OSError, StorageDown, StorageRefused) as error:
            log.warning("%s is published, and may have files that are no part of it: %s", self._at(""), error)

    def _remove_others(self, manifest: Manifest) -> None:
        def remove_one(name: str) -> None:
            remove(self._at(name), self._store.storage)
            self._on_progress()

        others = self._listed().keys() - manifest.files.keys() - {MANIFEST}
        call_concurrently(remove_one, sorted(others), CONCURRENT_QUESTIONS)

    def settled(self) -> bool:
        """Whether the leader has published the checkpoint, or has discarded what this rank has written."""
        # All ranks may ask this every second: no listing, which is as long as there are ranks.
        return (self._store.remote and self._exists(MANIFEST)) or not self._exists(
            f"{rank_name(self._rank)}.safetensors"
        )

    def discard(self) -> None:
        """Remove everything that was written, unless it is published."""
        if not self._store.remote:
            shutil.rmtree(self._folder, ignore_errors=True)
        elif not self._exists(MANIFEST):
            self._store.empty(step_name(self._step), self._on_progress)

    def discard_own(self) -> None:
        """Remove what this rank has written, unless it is published."""
        names = self._listed()
        if self._store.remote and MANIFEST in names:
            return
        for name in names:
            if writer_of(name) == self._rank:
                remove(self._at(name), self._store.storage)

    def _exists(self, name: str) -> bool:
        if not self._store.remote:
            return regular_size(self._at(name)) is not None
        try:
            # A question for the size of what is not there becomes one for a folder of that name, which is a listing.
            read_bytes(self._at(name), self._store.storage, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def _make_visible(self, manifest: bytes) -> None:
        if self._store.remote:
            write_bytes(self._at(MANIFEST), manifest, self._store.storage)
            return
        write_atomically(self._folder / MANIFEST, manifest)
        self._folder.rename(self._store.at(self._step))

    def _is_published(self, manifest: bytes) -> bool:
        """Whether there is a checkpoint of this step with exactly this manifest, which has the id of the run in it."""
        try:
            return read_bytes(join(self._store.at(self._step), MANIFEST), self._store.storage) == manifest
        except FileNotFoundError:
            return False

    def _record_name(self, rank: int) -> str:
        return f"{rank_name(rank)}.{self._attempt}.json"

    def _at(self, name: str) -> str:
        return join(self._store.at(self._step) if self._store.remote else self._folder, name)

    def _listed(self) -> dict[str, int | None]:
        """The files by name, with their sizes if the listing has them: that of an object store."""
        try:
            if self._store.remote:
                return {**list_files(self._at(""), self._store.storage)}
            return dict.fromkeys(regular_files(self._folder))
        except FileNotFoundError:
            return {}

    def _size(self, name: str, listed: Mapping[str, int | None]) -> int | None:
        return listed.get(name) if self._store.remote else regular_size(str(self._folder / name))


def _write_verified(path: Path, blocks: Sequence[memoryview], on_progress: Callable[[], None]) -> FileEntry:
    """Write `blocks` through to the disk, and verify them by reading them back.

    Hashing and writing take the same pieces in turn, outside Python's lock, so that training goes on meanwhile.
    """
    intended, size, unflushed = hashlib.sha256(), 0, 0
    with open(path, "wb", buffering=0) as file:
        _reserve(file.fileno(), sum(map(len, blocks)))
        for block in blocks:
            for start in range(0, len(block), _PIECE):
                piece = block[start : start + _PIECE]
                intended.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
                size += len(block[start : start + _PIECE])
                unflushed += _PIECE
                if unflushed >= _FLUSHED:
                    os.fdatasync(file.fileno())
                    unflushed = 0
                on_progress()
        os.fsync(file.fileno())
        # Otherwise the read would be answered from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found, memory = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            found.update(memory[:count])
            on_progress()
    _compare(str(path), found.hexdigest(), intended.hexdigest())
    return FileEntry(size, intended.hexdigest())


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the space of a file in advance.

    A file that does not fit must not fill the disk to the last byte first: the event log may be on the same disk.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size))
    # Not os.posix_fallocate, which writes the whole file where the file system does not support it.
    if size and libc.fallocate(*arguments) and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(code, os.strerror(code))


def _compare(location: str, found: str, intended: str) -> None:
    if found != intended:
        raise OSError(errno.EIO, "the data read back differs from what was written", location)
