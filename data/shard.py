"""Random access to the samples of one WebDataset tar on a local disk."""

import os
import re
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.index import ShardIndex

_KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")


def split_key(member: str) -> tuple[str, str] | None:
    """(key, extension) of a tar member: WebDataset cuts at the first dot of the base name. None if there is no dot."""
    match = _KEY_AND_EXTENSION.match(member)
    return (match.group(1), match.group(2).lower()) if match else None


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as stored: key, encoded image, class label."""

    key: str
    image: bytes
    label: int


class Shard:
    """One open tar. Reads are positional, so threads may share it; it closes with its last reference.

    Raises:
        DataError: not a tar, or other samples than the index says.
    """

    def __init__(self, path: Path, image_fields: tuple[str, ...], label_field: str, samples: int) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 (lives as long as the object)
        keys: dict[str, int] = {}
        images, labels = np.zeros((samples, 2), np.int64), np.zeros((samples, 2), np.int64)
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                for member in archive:
                    split = split_key(member.name) if member.isfile() else None
                    if split is None or split[1] not in (*image_fields, label_field):
                        continue
                    number = keys.setdefault(split[0], len(keys))
                    if number >= samples:
                        continue
                    (labels if split[1] == label_field else images)[number] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise DataError(f"shard {path}: not a readable tar ({error}); copy it again or rebuild it") from error
        if len(keys) != samples:
            raise DataError(f"shard {path}: {len(keys):,} samples, {samples:,} in the index; rebuild the index")
        incomplete = np.flatnonzero((images[:, 0] == 0) | (labels[:, 0] == 0))
        if incomplete.size:
            raise DataError(
                f"shard {path}: {incomplete.size:,} of {samples:,} samples have no image or no .{label_field} "
                f"(first: {list(keys)[incomplete[0]]}); rebuild it"
            )
        self.keys = list(keys)
        self._images: NDArray[np.int64] = images
        self._labels: NDArray[np.int64] = labels

    def read(self, place: int) -> EncodedSample:
        """The sample at position `place` of the tar."""
        label = self._read(self._labels[place])
        try:
            return EncodedSample(self.keys[place], self._read(self._images[place]), int(label))
        except ValueError:
            raise DataError(
                f"shard {self.path}: sample {self.keys[place]} has the label {label[:40]!r}, not a number; rebuild it"
            ) from None

    def _read(self, extent: NDArray[np.int64]) -> bytes:
        return os.pread(self._file.fileno(), int(extent[1]), int(extent[0]))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class OpenShards:
    """The shards of an index, opened when first read; the least recently used close beyond `capacity`."""

    def __init__(self, index: ShardIndex, capacity: int = 256) -> None:
        self.index = index
        self._capacity = capacity
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Shard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                entry = self.index.shards[number]
                shard = Shard(
                    Path(self.index.location(number)), self.index.image_fields, self.index.label.field, entry.samples
                )
                self._open[number] = shard
            self._open.move_to_end(number)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)
            return shard
