"""Sorted runs: checked images on a local disk, in shuffled order, from which shards are merged.

A run is a file of concatenated images and a table of them. The table is written last, so its presence means that the
run is complete. (External merge sort; Knuth, TAOCP 3, 5.4.)
"""

import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.accounting import Accounting
from data.building.class_folders import Selection
from data.building.class_tars import class_tar_images
from data.building.conversion import CheckedImage, Conversion, check_image
from data.building.keys import encoded_name, key_hash, shuffle_rank
from data.building.source import BrokenInput, ImageBatch, ImageFile, IndexedShard, SourceImage
from data.building.webdataset import shard_images
from data.errors import DataError, StorageRefused
from data.files.atomic_file import atomic_file
from data.files.json_records import parse_json
from data.images.decode import DecodeError
from data.limits import IMAGE_BYTES
from data.remote.storage import Storage, is_remote, read_bytes

_REQUESTS = 16  # concurrent requests of one worker to a remote source


@dataclass(frozen=True, slots=True)
class RunTask:
    """A run to be made: its path without suffix, and what goes into it."""

    path: Path
    batch: ImageBatch
    seed: int
    conversion: Conversion
    memory: int
    """Bytes of images that are sorted at a time."""
    storage: Storage
    selection: Selection


@dataclass(frozen=True, slots=True)
class RunTable:
    """The images of a run; arrays (n,), or (n + 1,) for bounds."""

    rank: NDArray[np.uint64]
    key_hash: NDArray[np.uint64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    kind: NDArray[np.uint16]
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
    broken: list[BrokenInput]
    inside: Accounting
    """Of the members of class tars."""

    @property
    def images(self) -> int:
        return len(self.rank)

    @property
    def bytes(self) -> int:
        return int(self.size.sum())


_ABOUT = "about"
"""The array of the file that holds the rest of the table, as JSON."""
_DTYPES = {
    "rank": np.uint64, "key_hash": np.uint64, "offset": np.int64, "size": np.int64, "kind": np.uint16,
    "extension": np.uint8, "label_bounds": np.int64, "labels": np.int32, "name_bounds": np.int64, "names": np.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _AboutRun:
    extensions: list[str]
    classes: list[str]
    broken: list[BrokenInput]
    inside: Accounting


def table_file(run: Path) -> Path:
    """Where the table of a run is stored."""
    return run.with_name(f"{run.name}.npz")


def images_file(run: Path) -> Path:
    """Where the images of a run are stored."""
    return run.with_name(f"{run.name}.images")


def make_run(task: RunTask) -> tuple[str, RunTable]:
    """Read, check and convert the images of a batch, and publish them as a run; returns its name and table.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        StorageRefused, StorageDown: the source refuses access or does not answer.
    """
    rows: list[_Row] = []
    broken: list[BrokenInput] = []
    inside = Accounting("members")
    waiting: list[tuple[_Row, bytes]] = []
    waiting_bytes = 0
    with atomic_file(images_file(task.path), shared=True) as file:
        for image in _read(task, inside):
            checked = image if isinstance(image, BrokenInput) else _checked(image, task.conversion)
            if isinstance(checked, BrokenInput):
                broken.append(checked)
                continue
            assert isinstance(image, SourceImage)
            waiting.append((_row(image, checked, task.seed), checked.encoded))
            waiting_bytes += len(checked.encoded)
            if waiting_bytes >= task.memory:
                rows += _write_sorted(file, waiting)
                waiting, waiting_bytes = [], 0
        rows += _write_sorted(file, waiting)
    table = _table(rows, broken, inside)
    _write_table(table_file(task.path), table)
    return task.path.name, table


def read_table(run: Path) -> RunTable:
    """The table of a run.

    Raises:
        DataError: it is missing or damaged.
    """
    path = table_file(run)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            arrays = {name: _read_column(archive, name) for name in (*_DTYPES, _ABOUT)}
        for name, dtype in _DTYPES.items():
            if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        about = parse_json(_AboutRun, arrays.pop(_ABOUT).tobytes())
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: not the table of a run ({error}); remove it and read the source again with the same coatnet "
            "shards build command"
        ) from None
    return RunTable(
        **arrays, extensions=about.extensions, classes=about.classes, broken=about.broken, inside=about.inside
    )


def _read_column(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        column: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return column


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


def _row(image: SourceImage, checked: CheckedImage, seed: int) -> _Row:
    return _Row(
        rank=shuffle_rank(image.name, seed),
        name=encoded_name(image.name),
        key_hash=key_hash(image.name),
        classes=image.classes,
        extension=checked.extension,
        kind=int(checked.kind),
        size=len(checked.encoded),
    )


def _read(task: RunTask, inside: Accounting) -> Iterator[SourceImage | BrokenInput]:
    batch, storage = task.batch, task.storage
    files: list[ImageFile] = []
    for content in batch.contents:
        if isinstance(content, ImageFile):
            files.append(content)
        elif isinstance(content, SourceImage | BrokenInput):
            yield content
        elif isinstance(content, IndexedShard):
            yield from shard_images(content, storage, inside)
        else:
            yield from class_tar_images(content, storage, task.selection, inside)
    if not any(is_remote(file.location) for file in files):
        yield from (_read_file(file, storage) for file in files)
        return
    with ThreadPoolExecutor(_REQUESTS) as executor:
        for first in range(0, len(files), 4 * _REQUESTS):
            yield from executor.map(lambda file: _read_file(file, storage), files[first : first + 4 * _REQUESTS])


def _read_file(file: ImageFile, storage: Storage) -> SourceImage | BrokenInput:
    try:
        stop = file.stop
        if stop is None and not is_remote(file.location):
            stop = os.path.getsize(file.location)
        if stop is not None and stop - file.start > IMAGE_BYTES:
            return BrokenInput(file.name, f"more than {IMAGE_BYTES:,} bytes", classes=file.classes)
        encoded = read_bytes(file.location, storage, file.start, file.stop)
    except FileNotFoundError:
        return BrokenInput(file.name, "no such file", classes=file.classes)
    except StorageRefused:
        raise
    except (OSError, DataError) as error:
        return BrokenInput(file.name, getattr(error, "strerror", None) or str(error), classes=file.classes)
    return SourceImage(file.name, file.classes, encoded)


def _checked(image: SourceImage, conversion: Conversion) -> CheckedImage | BrokenInput:
    try:
        return check_image(image.encoded, conversion)
    except DecodeError as error:
        return BrokenInput(image.name, str(error), classes=image.classes)


def _write_sorted(file: BinaryIO, images: list[tuple[_Row, bytes]]) -> Iterator[_Row]:
    for row, encoded in sorted(images, key=lambda image: (image[0].rank, image[0].name)):
        row.offset = file.tell()
        file.write(encoded)
        yield row


def _table(rows: list[_Row], broken: list[BrokenInput], inside: Accounting) -> RunTable:
    extensions = sorted({row.extension for row in rows})
    classes = sorted({name for row in rows for name in row.classes})
    number = {name: position for position, name in enumerate(classes)}
    return RunTable(
        rank=np.array([row.rank for row in rows], np.uint64),
        key_hash=np.array([row.key_hash for row in rows], np.uint64),
        offset=np.array([row.offset for row in rows], np.int64),
        size=np.array([row.size for row in rows], np.int64),
        kind=np.array([row.kind for row in rows], np.uint16),
        extension=np.array([extensions.index(row.extension) for row in rows], np.uint8),
        label_bounds=np.cumsum([0, *(len(row.classes) for row in rows)], dtype=np.int64),
        labels=np.array([number[name] for row in rows for name in row.classes], np.int32),
        name_bounds=np.cumsum([0, *(len(row.name) for row in rows)], dtype=np.int64),
        names=np.frombuffer(b"".join(row.name for row in rows), np.uint8),
        extensions=extensions,
        classes=classes,
        broken=broken,
        inside=inside,
    )


def _write_table(path: Path, table: RunTable) -> None:
    about = json.dumps(asdict(_AboutRun(table.extensions, table.classes, table.broken, table.inside)))
    arrays: dict[str, Any] = {name: getattr(table, name) for name in _DTYPES}
    arrays[_ABOUT] = np.frombuffer(about.encode(), np.uint8)
    with atomic_file(path, shared=True) as file:
        np.savez(file, **arrays)
