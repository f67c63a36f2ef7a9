"""Random access to the samples of one WebDataset tar on a local disk."""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Container
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.limits import IMAGE_BYTES, LABEL_BYTES
from data.tar import Member, read_tar

_KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")

# Why a sample is unusable, as far as known without reading its content.
_PROBLEMS = ("", "it has no image", "it has no label", "its key is repeated in the shard", "the shard ends before it")
_WHOLE, _NO_IMAGE, _NO_LABEL, _REPEATED, _TRUNCATED = range(5)


def split_key(member: str) -> tuple[str, str] | None:
    """(key, extension) of a tar member: WebDataset splits at the first dot of the base name.

    None without a dot, and for hidden files such as the `._name.jpg` of macOS.
    """
    match = _KEY_AND_EXTENSION.match(member)
    return (match.group(1), match.group(2).lower()) if match else None


class BrokenSample(ValueError):
    """An unusable sample; the message is the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as stored: key, encoded image, content of the label member."""

    key: str
    image: bytes
    label: bytes


@dataclass(frozen=True, slots=True)
class SampleMembers:
    """The members of one sample: consecutive ones with the same key, as WebDataset groups them."""

    key: str
    image: Member | None
    label: Member | None


def split_members(found: list[Member], image_fields: tuple[str, ...], label_field: str) -> list[tuple[str, str] | None]:
    """(key, extension) of the members that are images or labels, None for the others.

    Names with further dots, such as `photo_0.5.jpg` and `photo_0.5.cls`, are split at the last one if they make a whole
    sample by that, unless the part before the first dot is the key of a sample, to which they may belong.
    """
    fields = {*image_fields, label_field}
    splits: list[tuple[str, str] | None] = []
    dotted: list[tuple[int, str, str, str]] = []
    for place, member in enumerate(found):
        split = split_key(member.name)
        if split is None or split[1] in fields:
            splits.append(split)
            continue
        splits.append(None)
        _, dot, extension = split[1].rpartition(".")
        if dot and extension in fields:
            dotted.append((place, split[0], member.name.rpartition(".")[0], extension))
    if dotted:
        keys = {split[0] for split in splits if split}
        images = {key for _, _, key, extension in dotted if extension != label_field}
        whole = images & {key for _, _, key, extension in dotted if extension == label_field}
        for place, first, key, extension in dotted:
            if key in whole and first not in keys:
                splits[place] = (key, extension)
    return splits


def group_members(found: list[Member], image_fields: tuple[str, ...], label_field: str) -> list[SampleMembers]:
    """The samples in the members of a tar, in their order; see `split_members` for those that are ignored.

    Another key, or a second image or label of the same key, starts a new sample.
    """
    samples: list[SampleMembers] = []
    key, image, label = "", None, None
    for member, split in zip(found, split_members(found, image_fields, label_field), strict=True):
        if split is None:
            continue
        is_label = split[1] == label_field
        if split[0] != key or (label if is_label else image) is not None:
            if image or label:
                samples.append(SampleMembers(key, image, label))
            key, image, label = split[0], None, None
        image, label = (image, member) if is_label else (member, label)
    if image or label:
        samples.append(SampleMembers(key, image, label))
    return samples


class Shard:
    """An open tar of `samples` samples. Reads are positional, so threads may share it; it closes with its last
    reference.

    A damaged or truncated tar keeps its places: the samples after the damage are unusable.

    Raises:
        DataError: it has another number of samples without being damaged, or more, so it is not the indexed shard.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, image_fields: tuple[str, ...], label_field: str, samples: int) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 (lives as long as the object)
        found, _, self.damage, has_end, _ = read_tar(self._file.fileno())
        sample_groups = group_members(found, image_fields, label_field)
        if len(sample_groups) < samples and not has_end:
            self.damage = (
                self.damage or f"ends after {os.fstat(self._file.fileno()).st_size:,} bytes without an end mark"
            )
        if len(sample_groups) > samples or (len(sample_groups) < samples and not self.damage):
            raise DataError(
                f"shard {path}: {len(sample_groups):,} samples, {samples:,} in the index; index it again with: "
                "coatnet shards index"
            )
        self._extents: NDArray[np.int64] = np.zeros((samples, 4), np.int64)  # offset, size of image and of label
        self._problems: NDArray[np.uint8] = np.full(samples, _TRUNCATED, np.uint8)
        keys = [group.key.encode("utf-8", "surrogateescape") for group in sample_groups]
        self._keys = b"".join(keys)  # a fifth of the memory of a list of strings
        self._key_ends = np.cumsum([0, *map(len, keys)])
        seen: set[str] = set()
        for place, (key, image, label) in enumerate((g.key, g.image, g.label) for g in sample_groups):
            self._problems[place] = (
                _REPEATED if key in seen else _NO_IMAGE if image is None else _NO_LABEL if label is None else _WHOLE
            )
            seen.add(key)
            if image and label:
                self._extents[place] = (image.offset, image.size, label.offset, label.size)

    @property
    def readable(self) -> int:
        """Number of samples before any damage; members of the last one may be missing."""
        return len(self._key_ends) - 1

    def key(self, place: int) -> str:
        """The key of the sample at `place`; its place if the tar no longer contains it."""
        if place >= self.readable:
            return f"#{place}"
        return self._keys[self._key_ends[place] : self._key_ends[place + 1]].decode("utf-8", "replace")

    def read(self, place: int) -> EncodedSample:
        """The sample at position `place` of the tar.

        Raises:
            BrokenSample: it has no image or label, its key is repeated, or the tar is damaged there.
        """
        key, problem = self.key(place), self._problems[place]
        if problem != _WHOLE:
            why = f" ({self.damage})" if problem == _TRUNCATED else ""
            raise BrokenSample(key, _PROBLEMS[problem] + why)
        image_offset, image_size, label_offset, label_size = self._extents[place].tolist()
        for what, size, most in (("image", image_size, IMAGE_BYTES), ("label", label_size, LABEL_BYTES)):
            if size > most:
                raise BrokenSample(key, f"its {what} has {size:,} bytes; at most {most:,} are read")
        descriptor = self._file.fileno()
        image = os.pread(descriptor, image_size, image_offset)
        label = os.pread(descriptor, label_size, label_offset)
        if len(image) != image_size or len(label) != label_size:
            raise BrokenSample(key, "the shard ends inside it")
        return EncodedSample(key, image, label)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class OpenShards:
    """Shards opened by `open_shard` on first access; beyond `capacity` the least recently used are closed.

    Threads that access different shards do not wait for each other.
    """

    def __init__(self, open_shard: Callable[[int], Shard], capacity: int) -> None:
        self._open_shard = open_shard
        self._capacity = capacity
        self._open: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Shard:
        with self._lock:
            future = self._open.get(number)
            mine = future is None
            if future is None:
                future = self._open[number] = Future()
            self._open.move_to_end(number)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)
        if mine:
            try:
                future.set_result(self._open_shard(number))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def close_others(self, kept: Container[int]) -> None:
        """Close all shards but the `kept` ones; those that are being read, when that is done."""
        with self._lock:
            for number in [number for number in self._open if number not in kept]:
                del self._open[number]
