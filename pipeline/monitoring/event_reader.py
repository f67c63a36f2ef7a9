"""Scalars and images from TensorBoard's event files, with what of the files cannot be read.

TensorBoard's own readers leave out damaged records without a word, or end at the first one.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from data.files.regular_file import open_regular
from data.text.counted import counted
from pipeline.runs.run_folder import RunFolder

_FILES = "events.out.tfevents.*"
_LARGEST = 64 * 2**20  # bytes of a record
# Larger records are pictures, whose formats have checksums of their own, and histograms.
_LARGEST_CHECKED = 2**14
_TOGETHER = 8192  # records whose checksums are computed at a time
_CRC32C = 0x82F63B78  # Castagnoli's polynomial, reflected


class CurvePoint(NamedTuple):
    """One point of a curve."""

    step: int
    value: float
    """As in the event file, which has float32; it may be infinite or NaN."""
    time: float
    """When it was written, in seconds since the epoch."""


@dataclass(slots=True)
class RecordedEvents:
    """What the starts of a stage have recorded, as TensorBoard shows it: without what later starts have undone."""

    scalars: dict[str, list[CurvePoint]] = field(default_factory=dict)
    """By tag, in the order of the steps."""
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    """Steps and encoded images by tag."""
    problems: list[str] = field(default_factory=list)
    """What cannot be read, one sentence each."""
    files: int = 0

    def add(self, event: Event) -> None:
        """Add an event of a file, or drop what it undoes."""
        if event.session_log.status == SessionLog.START:
            self._undo_from(event.step)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                self.scalars.setdefault(value.tag, []).append(
                    CurvePoint(event.step, value.simple_value, event.wall_time)
                )
            elif value.HasField("image"):
                self.images.setdefault(value.tag, []).append((event.step, value.image.encoded_image_string))

    def merge(self, other: "RecordedEvents") -> None:
        """Add what another log has."""
        for tag, points in other.scalars.items():
            self.scalars[tag] = sorted([*self.scalars.get(tag, []), *points], key=lambda point: point.step)
        for tag, images in other.images.items():
            self.images.setdefault(tag, []).extend(images)
        self.problems += other.problems
        self.files += other.files

    def _undo_from(self, step: int) -> None:
        self.scalars = {tag: [p for p in points if p.step < step] for tag, points in self.scalars.items()}
        self.images = {tag: [p for p in points if p[0] < step] for tag, points in self.images.items()}


def read_stage_events(folder: RunFolder) -> RecordedEvents:
    """All that a stage has recorded: training, wherever this and earlier versions write it, and evaluations where they
    have a log of their own."""
    found = read_events(*{folder.path / "tensorboard", folder.path, folder.tensorboard})
    found.merge(read_events(folder.validation))
    return found


def read_events(*folders: Path) -> RecordedEvents:
    """The events in log folders of TensorBoard which are one log together; nothing for those that do not exist."""
    found = RecordedEvents()
    # In the order in which they were written, which is TensorBoard's.
    for path in sorted((path for folder in folders for path in folder.glob(_FILES)), key=lambda path: path.name):
        found.files += 1
        damaged = 0
        try:
            with open_regular(path) as file:
                for records in _batches(_records(file, path, found.problems)):
                    for record, whole in zip(records, _are_whole(records), strict=True):
                        event = _parsed(record[0]) if whole else None
                        if event is None:
                            damaged += 1
                            continue
                        found.add(event)
        except OSError as error:
            found.problems.append(f"{_shown(path)}: {error.strerror or error}")
        if damaged:
            found.problems.append(f"{_shown(path)}: {counted(damaged, 'record')} damaged and left out")
    for points in found.scalars.values():
        points.sort(key=lambda point: point.step)
    return found


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _parsed(record: bytes) -> Event | None:
    event = Event()
    try:
        event.ParseFromString(record)
    except Exception:  # protobuf's own, which has no type
        return None
    return event


def _records(file: BinaryIO, path: Path, problems: list[str]) -> Iterator[tuple[bytes, int]]:
    """The records of a file with their checksums, up to its end or to where it cannot be read any further."""
    start = 0
    while header := file.read(12):
        whole = len(header) == 12
        size, check = struct.unpack("<QI", header) if whole else (0, 0)
        if whole and (size > _LARGEST or not _are_whole([(header[:8], check)])[0]):
            problems.append(f"{_shown(path)}: damaged {start:,} bytes from its beginning; what follows is left out")
            return
        record, footer = file.read(size), file.read(4)
        if not whole or len(record) < size or len(footer) < 4:
            problems.append(f"{_shown(path)}: ends within a record, which is left out")
            return
        yield record, struct.unpack("<I", footer)[0]
        start += 16 + size


def _batches(records: Iterator[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    batch: list[tuple[bytes, int]] = []
    for record in records:
        batch.append(record)
        if len(batch) == _TOGETHER:
            yield batch
            batch = []
    if batch:
        yield batch


def _table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_CRC32C), table >> 1)
    return table


_TABLE = _table()


def _are_whole(records: list[tuple[bytes, int]]) -> list[bool]:
    """Whether the checksum of each record is right. They are computed byte by byte for all records together."""
    checked = [n for n in range(len(records)) if len(records[n][0]) <= _LARGEST_CHECKED]
    checked.sort(key=lambda n: -len(records[n][0]))
    lengths = np.array([len(records[n][0]) for n in checked])
    whole = [True] * len(records)
    if not checked:
        return whole
    content = np.zeros((int(lengths[0]), len(checked)), np.uint8)
    for column, n in enumerate(checked):
        content[: lengths[column], column] = np.frombuffer(records[n][0], np.uint8)
    sums = np.full(len(checked), 0xFFFFFFFF, np.uint32)
    counts = np.searchsorted(-lengths, -np.arange(int(lengths[0])), side="left")  # records longer than each position
    for position, count in enumerate(counts.tolist()):
        now = sums[:count]
        sums[:count] = _TABLE[(now ^ content[position, :count]) & 0xFF] ^ (now >> 8)
    sums = ~sums
    masked = ((sums >> 15) | (sums << 17)) + np.uint32(0xA282EAD8)  # TensorFlow's mask, modulo 2**32
    for column, n in enumerate(checked):
        whole[n] = int(masked[column]) == records[n][1]
    return whole
