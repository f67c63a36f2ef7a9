"""From the tables of all runs to the content of every shard: global order, validation split, bounds. Pure numpy."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.accounting import Accounting
from data.building.keys import decoded_name, sample_key
from data.building.sorted_runs import RunTable, read_table
from data.building.source import BrokenInput
from data.errors import DataError
from data.text.printable import one_line

_WHOLE_NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")
_NO_LABEL = {"-1", "-1.0", "nan", "none", "null", "na", "n/a", "<na>", "?"}

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_TAR_BLOCK = 512
_TAR_RECORD = 20 * _TAR_BLOCK
"""The size of a tar is a multiple of it."""
_TAR_END = 2 * _TAR_BLOCK
_EXTENDED_HEADER = 2 * _TAR_BLOCK
"""Of a member whose name is not ASCII: a header and a block with the name."""


@dataclass(frozen=True, slots=True)
class Images:
    """All images of a build. Arrays (N,) over the images, in the order of the runs."""

    run: Int32
    """Position of the image's run in the list of runs."""
    rank: NDArray[np.uint64]
    key_hash: NDArray[np.uint64]
    offset: Int64
    size: Int64
    kind: NDArray[np.uint16]
    extension: NDArray[np.uint8]
    """Position in `extensions`."""
    labels: Int32
    """(N, k) positions in `classes`, padded with -1."""
    name_bounds: Int64
    names: NDArray[np.uint8]
    extensions: tuple[str, ...]
    classes: tuple[str, ...]
    broken: list[BrokenInput]
    inside: Accounting = field(default_factory=lambda: Accounting("members"))
    """Of the members of class tars."""

    def encoded_name(self, image: int) -> bytes:
        return self.names[self.name_bounds[image] : self.name_bounds[image + 1]].tobytes()

    def name(self, image: int) -> str:
        return decoded_name(self.encoded_name(image))


def read_images(runs: Sequence[Path]) -> Images:
    """The images of all runs, and what could not be read."""
    tables = [read_table(run) for run in runs]
    inside = Accounting("members")
    for table in tables:
        inside.add(table.inside)
    classes = tuple(sorted({name for table in tables for name in table.classes}))
    extensions = tuple(sorted({name for table in tables for name in table.extensions}))
    counts = np.array([table.images for table in tables])
    ends = np.cumsum([0] + [len(table.names) for table in tables])
    most = max((int(np.diff(table.label_bounds).max(initial=0)) for table in tables), default=0)
    return Images(
        run=np.repeat(np.arange(len(tables), dtype=np.int32), counts),
        rank=np.concatenate([table.rank for table in tables]),
        key_hash=np.concatenate([table.key_hash for table in tables]),
        offset=np.concatenate([table.offset for table in tables]),
        size=np.concatenate([table.size for table in tables]),
        kind=np.concatenate([table.kind for table in tables]),
        extension=np.concatenate([_translate(t.extension, t.extensions, extensions).astype(np.uint8) for t in tables]),
        labels=np.concatenate([_padded_labels(table, classes, most) for table in tables]),
        name_bounds=np.concatenate(
            [table.name_bounds[:-1] + end for table, end in zip(tables, ends, strict=False)] + [ends[-1:]]
        ),
        names=np.concatenate([table.names for table in tables]),
        extensions=extensions,
        classes=classes,
        broken=[broken for table in tables for broken in table.broken],
        inside=inside,
    )


def _translate(positions: NDArray[np.generic], names: list[str], into: tuple[str, ...]) -> Int32:
    place = {name: position for position, name in enumerate(into)}
    return np.array([place[name] for name in names], np.int32)[positions.astype(np.int64)]


def _padded_labels(table: RunTable, classes: tuple[str, ...], most: int) -> Int32:
    counts = np.diff(table.label_bounds)
    padded = np.full((table.images, most), -1, np.int32)
    padded[np.arange(most) < counts[:, None]] = _translate(table.labels, table.classes, classes)
    return padded


def shuffled(images: Images) -> tuple[Int64, list[int]]:
    """Positions of the images in shuffled order, sorted by (rank, name), and those left out because an earlier image
    has the same name."""
    order = np.argsort(images.rank, kind="stable")
    ranks = images.rank[order]
    again: list[int] = []
    equal = np.flatnonzero(ranks[1:] == ranks[:-1])
    for first in equal[np.diff(equal, prepend=-2) > 1].tolist():
        last = int(np.searchsorted(ranks, ranks[first], side="right"))
        tied = sorted(order[first:last].tolist(), key=lambda image: (images.name(image), image))
        order[first:last] = tied
        again += [b for a, b in pairwise(tied) if images.name(a) == images.name(b)]
    return (order[~np.isin(order, again)] if again else order), again


def relabelled(images: Images, classes: tuple[str, ...], origin: str) -> Int32:
    """The labels (N, k) as positions in another class list, that of `origin`.

    Raises:
        DataError: it lacks a class.
    """
    place = {name: position for position, name in enumerate(classes)}
    unknown = [number for number, name in enumerate(images.classes) if name not in place]
    if unknown:
        image = int(np.flatnonzero((images.labels == unknown[0]).any(axis=1))[0])
        others = f" (nor are {len(unknown) - 1:,} more labels)" if len(unknown) > 1 else ""
        raise DataError(
            f"{one_line(images.name(image))}: its label {one_line(images.classes[unknown[0]])} is not among the "
            f"{len(classes):,} classes of {origin}{others}; fix the labels or give a class list that has them"
        )
    translation = np.array([place[name] for name in images.classes] + [-1], np.int32)
    return translation[images.labels]


def numbered(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The class list sorted by name, or by number if all names are numbers."""
    return tuple(sorted(classes, key=int)) if all(name.isascii() and name.isdigit() for name in classes) else classes


def whole_numbers(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The names without the `.0` with which pandas and spreadsheets write numbers, if all are whole numbers.

    Raises:
        DataError: all are numbers but for those that say that there is no label.
    """
    numbers = [_WHOLE_NUMBER.fullmatch(name) for name in classes]
    if all(numbers):
        return tuple(number[1] for number in numbers if number)
    others = [name for name, number in zip(classes, numbers, strict=True) if number is None]
    if any(numbers) and all(name.lower() in _NO_LABEL for name in others):
        raise DataError(
            f"all labels are numbers but for {', '.join(map(one_line, others))}, which may stand for a missing label "
            "and would be a class; leave these images out of the labels, or give the class list with --classes"
        )
    return classes


def validation_mask(labels: Int32, classes: tuple[str, ...], per_class: int, fraction: float) -> NDArray[np.bool_]:
    """Which images (N,), in shuffled order, are for validation: of each class the first `per_class` or `fraction`.

    Args:
        labels: (N, k), padded with -1. An image with several labels counts for each of them.
        classes: their names.
        per_class: number of images of each class, or 0.
        fraction: share of each class, rounded, leaving at least one image for training; or 0.

    Raises:
        DataError: a class would have no image for training.
    """
    image, place = np.nonzero(labels >= 0)
    label = labels[image, place]
    by_class = np.argsort(label, kind="stable")
    counts = np.bincount(label, minlength=len(classes))
    position = np.empty(len(label), np.int64)  # position among the images of the class
    position[by_class] = np.arange(len(label)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = np.full(len(classes), per_class) if per_class else np.minimum(np.rint(counts * fraction), counts - 1)
    mask = np.zeros(len(labels), np.bool_)
    mask[image[position < taken[label]]] = True
    left = np.bincount(label[~mask[image]], minlength=len(classes))
    short = np.flatnonzero((left == 0) & (counts > 0))
    if short.size:
        others = f" (and {short.size - 1:,} more classes)" if short.size > 1 else ""
        raise DataError(
            f"class {one_line(classes[short[0]])} has only {counts[short[0]]:,} images{others}, all of which would "
            "go to the validation set; add images or use fewer for validation"
        )
    return mask


def sample_bytes(images: Images, rows: Int64, labels: Int32, as_json: bool) -> Int64:
    """Bytes (n,) that the images `rows` (n,) with `labels` (n, k) take in a tar: two members with their headers."""
    content = _blocks(images.size[rows]) + _blocks(_json_bytes(labels) if as_json else _digits(labels[:, 0]))
    return 2 * _TAR_BLOCK + content + 2 * _EXTENDED_HEADER * _named_beyond_ascii(images)[rows]


def _blocks(bytes_: Int64) -> Int64:
    return -(-bytes_ // _TAR_BLOCK) * _TAR_BLOCK


def _json_bytes(labels: Int32) -> Int64:
    """Length (n,) of `{"labels": [1, 2]}` for labels (n, k) padded with -1."""
    present = labels >= 0
    separators = 2 * np.maximum(present.sum(axis=1) - 1, 0)
    digits: Int64 = np.where(present, _digits(labels), 0).sum(axis=1)
    length: Int64 = digits + separators + len('{"labels": []}')
    return length


def _digits(numbers: Int32) -> Int64:
    digits: Int64 = 1 + np.searchsorted(10 ** np.arange(1, 10), numbers, side="right")
    return digits


def _named_beyond_ascii(images: Images) -> NDArray[np.bool_]:
    """Which images (N,) have a key with other characters than ASCII."""
    found = np.zeros(len(images.rank), np.bool_)
    letters = np.flatnonzero(images.names >= 128)
    candidates = np.unique(np.searchsorted(images.name_bounds, letters, side="right") - 1)
    for image in candidates.tolist():  # not all of these characters are kept in the key
        found[image] = not sample_key(images.name(image)).isascii()
    return found


def cuts(bytes_: Int64, most_samples: int | None, most_bytes: int | None) -> Iterator[tuple[int, int]]:
    """Begin and end of each shard, which has as many samples as both limits allow, but at least one.

    Args:
        bytes_: (N,) of each sample in a tar.
        most_samples: limit to the samples of a shard.
        most_bytes: limit to the size of a shard, with the end of the tar.
    """
    ends = np.cumsum(bytes_)
    begin = 0
    while begin < len(bytes_):
        end = len(bytes_) if most_samples is None else min(begin + most_samples, len(bytes_))
        if most_bytes is not None:
            before = int(ends[begin - 1]) if begin else 0
            room = most_bytes // _TAR_RECORD * _TAR_RECORD - _TAR_END
            end = min(end, int(np.searchsorted(ends, before + room, side="right")))
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def repetitions(key_hashes: NDArray[np.uint64]) -> dict[int, int]:
    """Position -> which sample with its key it is (2 for the second), without the first ones; hashes (N,) in order."""
    order = np.argsort(key_hashes, kind="stable")
    sorted_hashes = key_hashes[order]
    repeated: dict[int, int] = {}
    for position in np.flatnonzero(sorted_hashes[1:] == sorted_hashes[:-1]).tolist():
        repeated[int(order[position + 1])] = repeated.get(int(order[position]), 1) + 1
    return repeated
