"""Writing one shard: a WebDataset tar with samples from sorted runs."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray

from data.building.keys import decoded_name, sample_key
from data.building.sorted_runs import images_file
from data.files.atomic_file import atomic_file, write_atomically
from data.files.json_records import parse_json
from data.index import ShardEntry

_NEAR = 2**16  # bytes between two images that are faster to read than to skip


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be written. Arrays (n,) over its samples, in their order in the tar."""

    path: Path
    entry: Path
    """The file that records, once the shard is complete, its `FinishedShard`."""
    runs: list[Path]
    run: NDArray[np.int32]
    """Position in `runs`."""
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    names: list[bytes]
    repetition: list[int]
    """Of each sample, counting from 1: which of the samples with the same key it is."""
    extensions: list[str]
    labels: NDArray[np.int32]
    """(n, k), padded with -1."""
    as_json: bool
    """Whether labels are written as JSON lists: necessary unless each sample has exactly one."""
    memory: int
    """Bytes of images in memory at a time."""

    @property
    def digest(self) -> str:
        """Of everything that determines the bytes of the shard."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.path.name, [run.name for run in self.runs], self.names, self.repetition)).encode())
        digest.update(repr((self.extensions, self.as_json)).encode())
        for array in (self.run, self.offset, self.size, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that has been written: the digest of its task, and its entry in the index."""

    task: str
    shard: ShardEntry


def finished_shard(task: ShardTask) -> ShardEntry | None:
    """The entry of a shard that an earlier build wrote for the same task; None if it must be written (again)."""
    try:
        finished = parse_json(FinishedShard, task.entry.read_bytes())
        if finished.task == task.digest and task.path.stat().st_size == finished.shard.bytes:
            return finished.shard
    except (FileNotFoundError, ValueError):
        pass
    return None


def write_shard(task: ShardTask) -> tuple[Path, ShardEntry]:
    """Write a shard, then its entry; returns its path and entry.

    Raises:
        OSError: the disk is full or cannot be written, or a run is missing.
    """
    with atomic_file(task.path) as file:
        hashing = _Hashing(file)
        # Integer times: tarfile spends another 1,024 bytes per member on fractions of a second. Owner and mode are
        # fixed, so that the same samples give the same bytes.
        writer = webdataset.TarWriter(hashing, mtime=0, encoder=False)
        for position, encoded in enumerate(_images(task)):
            labels = [int(label) for label in task.labels[position] if label >= 0]
            label = json.dumps({"labels": labels}) if task.as_json else str(labels[0])
            key = sample_key(decoded_name(task.names[position]))
            if task.repetition[position] > 1:
                key += f"~{task.repetition[position]}"  # no key contains a ~ itself
            field = "json" if task.as_json else "cls"
            writer.write({"__key__": key, task.extensions[position]: encoded, field: label.encode()})
        writer.close()
    entry = ShardEntry(task.path.name, len(task.names), hashing.bytes, hashing.sha256.hexdigest())
    write_atomically(task.entry, json.dumps(asdict(FinishedShard(task.digest, entry))))
    return task.path, entry


def _images(task: ShardTask) -> Iterator[bytes]:
    """The encoded images in order, read `memory` bytes at a time."""
    part = (np.cumsum(task.size) - task.size) // task.memory
    for number in np.unique(part):
        yield from _read(task, np.flatnonzero(part == number))


def _read(task: ShardTask, samples: NDArray[np.int64]) -> list[bytes]:
    """The images of `samples`; each run is read front to back, and neighbours in one request."""
    images: dict[int, bytes] = {}
    order = samples[np.lexsort((task.offset[samples], task.run[samples]))]
    run, start, stop = task.run[order], task.offset[order], task.offset[order] + task.size[order]
    apart = (run[1:] != run[:-1]) | (start[1:] - stop[:-1] > _NEAR)
    for group in np.split(np.arange(len(order)), np.flatnonzero(apart) + 1):
        first, last = int(group[0]), int(group[-1])
        block = _read_extent(task.runs[int(run[first])], int(start[first]), int(stop[last]))
        for member in group.tolist():
            images[int(order[member])] = block[start[member] - start[first] : stop[member] - start[first]]
    return [images[sample] for sample in samples.tolist()]


def _read_extent(run: Path, start: int, stop: int) -> bytes:
    path = images_file(run)
    with open(path, "rb", buffering=0) as file:
        block = os.pread(file.fileno(), stop - start, start)
    if len(block) != stop - start:
        raise OSError(None, f"ends after {start + len(block):,} bytes; remove the unfinished build", str(path))
    return block


class _Hashing(io.RawIOBase):
    """Forwards writes to a file, counting and hashing the bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, block: bytes) -> int:  # type: ignore[override]
        self.sha256.update(block)
        self.bytes += len(block)
        return self._file.write(block)

    def tell(self) -> int:
        return self.bytes
