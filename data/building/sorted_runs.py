"""Runs: checked images on a local disk, sorted by their place in the shuffle, from which shards are merged.

A run is a file of images one after the other and a table of them. The table is written last, so a run that has one is
whole. (External merge sort; Knuth, TAOCP 3, 5.4.)
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.atomic_file import atomic_file
from data.building.archive import class_tar_images
from data.building.conversion import CheckedImage, Conversion, check_image
from data.building.keys import encoded_name, key_hash, shuffle_rank
from data.building.source import Broken, Image, ImageBatch, ImageFile
from data.decode import DecodeError
from data.errors import DataError, StorageRefused
from data.storage import Storage, is_remote, read_bytes

_REQUESTS = 16  # files of a remote source that one worker asks for at the same time


@dataclass(frozen=True, slots=True)
class RunTask:
    """A run to be made: its place without suffix, and what goes into it."""

    path: Path
    batch: ImageBatch
    seed: int
    conversion: Conversion
    memory: int
    """Bytes of images that are sorted at a time."""
    storage: Storage


@dataclass(frozen=True, slots=True)
class RunTable:
    """The images of a run; arrays (n,), or (n + 1,) where they say where something begins and ends."""

    rank: NDArray[np.uint64]
    key_hash: NDArray[np.uint64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    kind: NDArray[np.uint8]
    """Bits of `Kind`."""
    extension: NDArray[np.uint8]
    """Position in `extensions`."""
    label_bounds: NDArray[np.int64]
    labels: NDArray[np.int32]
    """Positions in `classes`."""
    name_bounds: NDArray[np.int64]
    names: NDArray[np.uint8]
    extensions: list[str]
    classes: list[str]
    broken: list[Broken]

    @property
    def images(self) -> int:
        return len(self.rank)

    @property
    def bytes(self) -> int:
        return int(self.size.sum())


def table_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.npz")


def images_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.images")


def make_run(task: RunTask) -> tuple[str, RunTable]:
    """Read, check and convert the images of a batch, and publish them as a run; its name and table.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        StorageRefused, StorageDown: the source refuses access or does not answer.
    """
    rows: list[_Row] = []
    broken: list[Broken] = []
    waiting: list[tuple[_Row, bytes]] = []
    waiting_bytes = 0
    with atomic_file(images_file(task.path), shared=True) as file:
        for image in _read(task.batch, task.storage):
            checked = image if isinstance(image, Broken) else _checked(image, task.conversion)
            if isinstance(checked, Broken):
                broken.append(checked)
                continue
            assert isinstance(image, Image)
            waiting.append((_row(image, checked, task.seed), checked.encoded))
            waiting_bytes += len(checked.encoded)
            if waiting_bytes >= task.memory:
                rows += _write_sorted(file, waiting)
                waiting, waiting_bytes = [], 0
        rows += _write_sorted(file, waiting)
    table = _table(rows, broken)
    _write_table(table_file(task.path), table)
    return task.path.name, table


def read_table(run: Path) -> RunTable:
    """The table of a run."""
    with np.load(table_file(run), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        return RunTable(
            **{name: arrays[name] for name in arrays.files if name != "about"},
            extensions=about["extensions"],
            classes=about["classes"],
            broken=[Broken(**entry) for entry in about["broken"]],
        )


@dataclass(slots=True)
class _Row:
    rank: int
    name: bytes
    key_hash: int
    classes: tuple[str, ...]
    extension: str
    kind: int
    size: int
    offset: int = 0


def _row(image: Image, checked: CheckedImage, seed: int) -> _Row:
    return _Row(
        rank=shuffle_rank(image.name, seed),
        name=encoded_name(image.name),
        key_hash=key_hash(image.name),
        classes=image.classes,
        extension=checked.extension,
        kind=int(checked.kind),
        size=len(checked.encoded),
    )


def _read(batch: ImageBatch, storage: Storage) -> Iterator[Image | Broken]:
    files: list[ImageFile] = []
    for content in batch.contents:
        if isinstance(content, ImageFile):
            files.append(content)
        elif isinstance(content, Image | Broken):
            yield content
        else:
            yield from class_tar_images(content, storage)
    if not any(is_remote(file.location) for file in files):
        yield from (_read_file(file, storage) for file in files)
        return
    with ThreadPoolExecutor(_REQUESTS) as executor:
        for first in range(0, len(files), 4 * _REQUESTS):
            yield from executor.map(lambda file: _read_file(file, storage), files[first : first + 4 * _REQUESTS])


def _read_file(file: ImageFile, storage: Storage) -> Image | Broken:
    try:
        encoded = read_bytes(file.location, storage, file.start, file.stop)
    except FileNotFoundError:
        return Broken(file.name, "no such file")
    except StorageRefused:
        raise
    except (OSError, DataError) as error:
        return Broken(file.name, getattr(error, "strerror", None) or str(error))
    return Image(file.name, file.classes, encoded)


def _checked(image: Image, conversion: Conversion) -> CheckedImage | Broken:
    try:
        return check_image(image.encoded, conversion)
    except DecodeError as error:
        return Broken(image.name, str(error))


def _write_sorted(file: BinaryIO, images: list[tuple[_Row, bytes]]) -> Iterator[_Row]:
    for row, encoded in sorted(images, key=lambda image: (image[0].rank, image[0].name)):
        row.offset = file.tell()
        file.write(encoded)
        yield row


def _table(rows: list[_Row], broken: list[Broken]) -> RunTable:
    extensions = sorted({row.extension for row in rows})
    classes = sorted({name for row in rows for name in row.classes})
    number = {name: position for position, name in enumerate(classes)}
    return RunTable(
        rank=np.array([row.rank for row in rows], np.uint64),
        key_hash=np.array([row.key_hash for row in rows], np.uint64),
        offset=np.array([row.offset for row in rows], np.int64),
        size=np.array([row.size for row in rows], np.int64),
        kind=np.array([row.kind for row in rows], np.uint8),
        extension=np.array([extensions.index(row.extension) for row in rows], np.uint8),
        label_bounds=np.cumsum([0, *(len(row.classes) for row in rows)], dtype=np.int64),
        labels=np.array([number[name] for row in rows for name in row.classes], np.int32),
        name_bounds=np.cumsum([0, *(len(row.name) for row in rows)], dtype=np.int64),
        names=np.frombuffer(b"".join(row.name for row in rows), np.uint8),
        extensions=extensions,
        classes=classes,
        broken=broken,
    )


def _write_table(path: Path, table: RunTable) -> None:
    about = {
        "extensions": table.extensions,
        "classes": table.classes,
        "broken": [{"name": b.name, "reason": b.reason, "is_tar": b.is_tar} for b in table.broken],
    }
    arrays = {name: getattr(table, name) for name in RunTable.__slots__ if name not in about}
    with atomic_file(path, shared=True) as file:
        np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
