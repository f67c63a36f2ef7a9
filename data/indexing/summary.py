"""A summary of a dataset from its index, its labels, and a few samples drawn at random."""

import io
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.dataset import Dataset
from data.errors import DataError
from data.images.contact_sheet import thumbnail
from data.images.decode import DecodeError, Pixels, decode
from data.index import read_labels
from data.remote.storage import is_remote, read_bytes
from data.shard import BrokenSample, Shard

_HEAD_BYTES = 8 * 2**20
"""Bytes at the start of a remote shard that samples are drawn from; the whole shard if they contain none."""
_REMOTE_SHARDS = 16
_QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


@dataclass(frozen=True, slots=True, eq=False)
class DrawnSample:
    """One sample drawn at random."""

    shard: str
    key: str
    classes: tuple[str, ...]
    format: str
    """Such as "JPEG RGB"; empty if the sample is unusable."""
    width: int
    height: int
    thumbnail: Pixels | None
    """None if the sample is unusable."""
    problem: str
    """Why it is unusable."""


def draw_samples(dataset: Dataset, count: int, seed: int) -> Iterator[DrawnSample]:
    """Up to `count` samples, the same ones for the same seed, in the order of the shards.

    Those of a remote dataset come from the first megabytes of a few shards, so that little is downloaded.

    Raises:
        DataError: a shard is missing or differs from the index.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    rng = np.random.default_rng(seed)
    sizes = dataset.shard_samples
    count = min(count, dataset.samples)
    if is_remote(dataset.index.folder):
        chances = sizes / sizes.sum()
        shards = min(_REMOTE_SHARDS, count, int((chances > 0).sum()))
        numbers = np.sort(rng.choice(len(chances), shards, replace=False, p=chances)).tolist()
        wanted = {number: len(range(turn, count, shards)) for turn, number in enumerate(numbers)}
    else:
        drawn = np.sort(rng.choice(dataset.samples, count, replace=False))
        wanted = Counter(np.searchsorted(np.cumsum(sizes), drawn, side="right").tolist())
    with TemporaryDirectory(prefix="coatnet-shards-") as temporary:
        for number, samples in wanted.items():
            shard, readable = _opened(dataset, number, Path(temporary) / "head.tar")
            candidates = bisect_left(range(int(sizes[number])), readable, key=partial(dataset.place, number))
            for chosen in np.sort(rng.choice(candidates, min(samples, candidates), replace=False)).tolist():
                yield _drawn(dataset, number, shard, dataset.place(number, chosen))


def _opened(dataset: Dataset, number: int, head: Path) -> tuple[Shard, int]:
    """Shard `number`, or the head of a remote one; and how many of its samples are available, from the first."""
    index = dataset.index
    entry, location = index.shards[number], index.location(number)
    try:
        if not is_remote(location):
            return Shard(Path(location), index.image_fields, index.label.field, entry.samples), entry.samples
        for length in (min(_HEAD_BYTES, entry.bytes), entry.bytes):
            head.write_bytes(read_bytes(location, dataset.storage, 0, length))
            shard = Shard(head, index.image_fields, index.label.field, entry.samples)
            if length == entry.bytes:
                break
            if shard.readable > 1:
                return shard, shard.readable - 1  # the last one may be truncated
        return shard, entry.samples
    except FileNotFoundError:
        raise DataError(f"shard {location} is missing; copy it there, and see: coatnet shards verify") from None


def _drawn(dataset: Dataset, number: int, shard: Shard, place: int) -> DrawnSample:
    name, key = dataset.index.shards[number].name, shard.key(place)
    try:
        sample = shard.read(place)
        classes = tuple(dataset.classes[label] for label in dataset.labels(sample.label))
        pixels = decode(sample.image)
    except (BrokenSample, DecodeError, ValueError) as error:
        return DrawnSample(name, key, (), "", 0, 0, None, str(error))
    height, width, _ = pixels.shape
    kind = "JPEG"
    with suppress(UnidentifiedImageError), Image.open(io.BytesIO(sample.image)) as image:
        # Pillow refuses bytes between the segments of a JPEG's header, which libjpeg passes over.
        kind = f"{image.format} {image.mode}"
    return DrawnSample(name, key, classes, kind, width, height, thumbnail(pixels), "")


def class_counts(dataset: Dataset) -> tuple[NDArray[np.int64], int]:
    """(classes,) samples of each class, one with several classes counted for each; and samples without any.

    Raises:
        DataError: no `labels.npy`, or one that does not match the index.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    labels = read_labels(dataset.index, dataset.storage)
    if dataset.label_map is not None:
        # One more class at the end, which the padding of -1 selects.
        labels = np.append(dataset.label_map.targets, np.int32(-1))[labels]
    labels = labels if dataset.kept is None else labels[dataset.kept]
    rows = np.sort(labels, axis=1)
    # Classes that a label map merged count once per sample.
    first = np.concatenate([np.ones((len(rows), 1), bool), rows[:, 1:] != rows[:, :-1]], axis=1)
    counts = np.bincount(rows[first & (rows >= 0)], minlength=len(dataset.classes))
    return counts, int((rows < 0).all(axis=1).sum())


def describe(dataset: Dataset, drawn: list[DrawnSample]) -> dict[str, Any]:
    """What `--json` prints; the keys are documented in docs/indexing.md."""
    index = dataset.index
    usable = [sample for sample in drawn if not sample.problem]
    try:
        counts, without = class_counts(dataset)
    except DataError as error:
        histogram: dict[str, Any] = {"classes": None, "without_label": None, "problem": str(error)}
    else:
        histogram = {
            "classes": dict(zip(dataset.classes, counts.tolist(), strict=True)),
            "without_label": without,
            "problem": None,
        }
    return {
        "folder": index.folder,
        "digest": dataset.digest,
        "image_fields": list(index.image_fields),
        "label": index.label.content(),
        "classes": len(dataset.classes),
        "samples": dataset.samples,
        "left_out": index.samples - dataset.samples,
        "labels_per_sample": index.labels_per_sample,
        "bytes": index.bytes,
        "bytes_per_sample": round(index.bytes / max(index.samples, 1)),
        "shards": {
            "number": len(index.shards),
            "samples": _spread(dataset.shard_samples),
            "bytes": _spread(np.array([shard.bytes for shard in index.shards])),
        },
        "drawn": {
            "samples": len(drawn),
            "formats": dict(Counter(sample.format for sample in usable).most_common()),
            "width": _quantiles([sample.width for sample in usable]),
            "height": _quantiles([sample.height for sample in usable]),
            "unusable": [{"shard": s.shard, "key": s.key, "problem": s.problem} for s in drawn if s.problem],
        },
        "histogram": histogram,
    }


def _spread(values: NDArray[np.int64]) -> dict[str, int]:
    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _quantiles(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    return {name: int(np.quantile(values, share)) for name, share in _QUANTILES.items()}
