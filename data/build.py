"""Images to WebDataset shards: shuffled globally, each image checked by decoding it, published by one rename."""

import hashlib
import io
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset

from data.decode import DecodeError, decode
from data.errors import DataError
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.source import SourceImage, list_images

_UNSAFE = re.compile(r"[^\w\-+@=,() ]")  # in keys: a dot would end the key


@dataclass(frozen=True, slots=True)
class Broken:
    """An image that does not decode, and the decoder's words."""

    class_name: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build wrote."""

    indexes: dict[Path, ShardIndex]
    """By final folder."""
    left_out: list[Broken]


def build_shards(
    source: Path,
    destination: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 4096,
    validation_per_class: int = 0,
    skip_broken: bool = False,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Write the images of `source` as shards and `index.json` into `destination`.

    The same source, seed and options give the same bytes. With `validation_per_class` the shards lie in
    `destination/train` and `destination/validation`, the latter with that many images of each class. `progress` is
    called with images done and images in all. Nothing is visible under `destination` before everything is.

    Raises:
        DataError: a source that `list_images` refuses, a destination that exists, images that do not decode (unless
            `skip_broken`), or a class too small for the validation split.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(f"{destination}: already exists; choose another destination or remove it")
    images = list_images(source)
    classes = tuple(sorted({image.class_name for image in images}))
    images = [images[i] for i in np.random.default_rng(seed).permutation(len(images))]
    parts = {"": images} if not validation_per_class else _split(images, classes, validation_per_class)

    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = destination.with_name(f".{destination.name}.building")
    shutil.rmtree(unfinished, ignore_errors=True)
    broken: list[Broken] = []
    done = 0
    indexes: dict[Path, ShardIndex] = {}
    with ThreadPoolExecutor(threads) as executor:
        for part, part_images in parts.items():
            folder = unfinished / part
            folder.mkdir(parents=True)
            keys = _keys(part_images)
            shards: list[ShardEntry] = []
            for first in range(0, len(part_images), samples_per_shard):
                chunk = part_images[first : first + samples_per_shard]
                name = f"{part or 'shard'}-{len(shards):06d}.tar"
                good = _checked(executor, chunk, keys[first : first + samples_per_shard], broken)
                shards += _write_shard(folder / name, good, classes)
                done += len(chunk)
                progress(done, len(images))
            fields = tuple(sorted({image.extension for image in part_images}))
            index = ShardIndex(str(folder), classes, fields, LabelFormat(), tuple(shards))
            index.write()
            indexes[destination / part] = index
    if broken and not skip_broken:
        shutil.rmtree(unfinished)
        listing = "; ".join(f"{b.name} ({b.reason})" for b in broken[:5])
        raise DataError(
            f"{source}: {len(broken):,} of {len(images):,} images cannot be decoded: {listing}"
            f"{' ...' if len(broken) > 5 else ''}. Replace or remove them, or leave them out with --skip-broken"
        )
    left = Counter(image.class_name for image in images) - Counter(image.class_name for image in broken)
    emptied = [name for name in classes if name not in left]
    if emptied:
        shutil.rmtree(unfinished)
        raise DataError(f"{source}: no image of class {emptied[0]} can be decoded; replace them or remove the class")
    if destination.exists():
        destination.rmdir()
    unfinished.rename(destination)
    return BuildReport(indexes, broken)


def _split(images: list[SourceImage], classes: tuple[str, ...], per_class: int) -> dict[str, list[SourceImage]]:
    """The first `per_class` images of each class in the shuffled order for validation, the rest for training."""
    taken = dict.fromkeys(classes, 0)
    train: list[SourceImage] = []
    validation: list[SourceImage] = []
    for image in images:
        if taken[image.class_name] < per_class:
            taken[image.class_name] += 1
            validation.append(image)
        else:
            train.append(image)
    short = sorted(set(classes) - {image.class_name for image in train})
    if short:
        raise DataError(
            f"class {short[0]} has no more than {per_class} images, all of which would go to the validation set; "
            "add images or take fewer for validation"
        )
    return {"train": train, "validation": validation}


def _keys(images: list[SourceImage]) -> list[str]:
    """A WebDataset key per image: class/stem without further dots, unique, short enough for a tar header."""
    seen: dict[str, int] = {}
    keys = []
    for image in images:
        class_name, _, file_name = image.name.rpartition("/")
        stem = file_name.rpartition(".")[0]
        key = "/".join(_UNSAFE.sub("_", part) for part in (class_name, stem))
        if len(key.encode()) > 80:
            key = f"{hashlib.sha256(image.name.encode()).hexdigest()[:32]}"
        seen[key] = seen.get(key, 0) + 1
        keys.append(key if seen[key] == 1 else f"{key}~{seen[key]}")
    return keys


def _checked(
    executor: ThreadPoolExecutor, images: list[SourceImage], keys: list[str], broken: list[Broken]
) -> Iterator[tuple[str, SourceImage, bytes]]:
    """Key, image and bytes of those that decode; the others join `broken`."""

    def read(image: SourceImage) -> bytes | Broken:
        try:
            encoded = image.read()
            decode(encoded)
            return encoded
        except (DecodeError, OSError) as error:
            return Broken(image.class_name, image.name, str(error))

    for key, image, encoded in zip(keys, images, executor.map(read, images), strict=True):
        if isinstance(encoded, Broken):
            broken.append(encoded)
        else:
            yield key, image, encoded


class _Hashing(io.RawIOBase):
    """Passes what is written on to a file, counting and hashing it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed in close)
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

    def close(self) -> None:
        self._file.close()
        super().close()


def _write_shard(
    path: Path, samples: Iterator[tuple[str, SourceImage, bytes]], classes: tuple[str, ...]
) -> list[ShardEntry]:
    """The tar at `path`; an empty list, and no file, when no sample of it is left."""
    labels = {name: number for number, name in enumerate(classes)}
    count = 0
    with _Hashing(path) as file:
        # Fixed owner, mode and time: the same samples give the same bytes.
        writer = webdataset.TarWriter(file, mtime=0.0)
        for key, image, encoded in samples:
            writer.write({"__key__": key, image.extension: encoded, "cls": labels[image.class_name]})
            count += 1
        writer.close()
    if count == 0:
        path.unlink()
        return []
    return [ShardEntry(path.name, count, file.bytes, file.sha256.hexdigest())]
