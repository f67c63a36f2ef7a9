"""Shards, their index and labels, the images and labels in them, and the folder of a build."""

import contextlib
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.building.build import build_shards
from data.building.build_folder import BuildFolder, BuildPlan, ReadOptions, WriteOptions
from data.building.build_record import RECORD_NAME, read_record
from data.building.class_folders import Selection
from data.building.class_tars import Content, Lost
from data.building.conversion import Conversion
from data.building.formats import NotTaken
from data.building.tar_members import DAMAGES, members, open_seekable, open_stream
from data.classes.labels import LabelReader
from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.images.decode import MAX_PIXELS, DecodeError, Pixels, decode, decode_window
from data.images.jpeg_region import find_region_decoder
from data.images.orientation import is_turned
from data.index import (
    FILE_NAME,
    LABELS_NAME,
    LabelFormat,
    ShardEntry,
    ShardIndex,
    check_shards,
    labels_file,
    read_index,
    read_labels,
)
from data.indexing.inference import GivenFields, infer_fields, read_head
from data.indexing.verify import verify_shards
from data.remote.storage import Storage
from data.shard import BrokenSample, Shard
from data.tar import read_tar
from pipeline.preflight.shards import unreadable
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target
from tests.fuzzing.mutation import damaged_bytes, damaged_json, damaged_tar, damaged_value

_CLASSES = ("bright", "dark", "striped")
_LABEL_FORMATS = (
    LabelFormat("cls"), LabelFormat("txt", by="name"), LabelFormat("json"), LabelFormat("json", key="a.b"),
    LabelFormat("json", key="label", by="name"), LabelFormat("txt", lists="classes"), LabelFormat("txt", lists="multi-hot"),
    LabelFormat("json", lists="multi-hot"), LabelFormat("cls", first=1, ignored=("-1", "0")),
)  # fmt: skip
_LABELS = (
    b"1", b"1.0", b" 2\n", b"dark", b"dark, bright", b"0 1 1", b"[0, 1, 0]", b'{"label": "dark"}', b'{"a": {"b": 1}}',
    b'{"a.b": [1, 2]}', b'{"label": 1, "label": 2}', b"true", b"[true, false, true]", b"-1", "é".encode(), b"\xff\xfe1\0",
)  # fmt: skip


def _pictures() -> list[bytes]:
    """Small images of every kind that is decoded."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "JPEG", {}), (colour, "JPEG", {"progressive": True}), (colour, "JPEG", {"subsampling": 0}),
        (colour, "JPEG", {"restart_marker_blocks": 1}), (colour, "JPEG", {"restart_marker_rows": 1, "subsampling": 0}),
        (colour.convert("L"), "JPEG", {}), (colour.convert("CMYK"), "JPEG", {}), (colour, "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}), (colour.convert("RGBA"), "PNG", {}), (colour.convert("1"), "PNG", {}),
        (Image.fromarray(rng.integers(0, 65535, (9, 9), np.uint16)), "PNG", {}), (colour, "WEBP", {}),
        (colour, "WEBP", {"lossless": True}), (colour.convert("RGBA"), "WEBP", {}),
        (colour, "WEBP", {"save_all": True, "append_images": [colour.rotate(90)]}),
    ]  # fmt: skip
    found = []
    for picture, kind, options in kinds:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def _tars() -> list[bytes]:
    """Small shards in the formats of several writers, with links, folders and long names."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for number, picture in enumerate(_pictures()[:4]):
                for name, content in ((f"n/{number}.jpg", picture), (f"n/{number}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            for name, kind, target in (
                ("d", tarfile.DIRTYPE, ""),
                ("l.jpg", tarfile.SYMTYPE, "n/0.jpg"),
                ("l.cls", tarfile.LNKTYPE, "n/0.cls"),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                archive.addfile(member)
            if form != tarfile.USTAR_FORMAT:
                archive.addfile(tarfile.TarInfo("ü" * 120 + ".jpg"))
        found.append(file.getvalue().rstrip(b"\0") + bytes(1536))
    return [content + bytes(-len(content) % 512) for content in found]


def _shard(folder: Path, seeds: list[bytes], mutate: Callable[[random.Random, bytes], bytes]) -> Fuzz:
    path = folder / "s.tar"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with open(path, "rb") as file:
            found = read_tar(file.fileno())
        for member in found.members:
            if member.offset < 0 or member.size < 0 or member.offset + member.size > len(content):
                raise SilentAcceptance("a member is not inside its tar")
        shard = Shard(path, ("jpg", "png"), "cls", 5)
        for place in range(5):
            try:
                sample = shard.read(place)
            except BrokenSample:
                continue
            if sample.key != shard.key(place).encode("utf-8", "replace").decode():
                raise SilentAcceptance("a sample has another key than its shard")

    return Fuzz(lambda rng: mutate(rng, rng.choice(seeds)), read)


def _tar_bytes(folder: Path) -> Fuzz:
    return _shard(folder, _tars(), damaged_bytes)


def _tar_headers(folder: Path) -> Fuzz:
    return _shard(folder, _tars(), damaged_tar)


def _tar_source(folder: Path) -> Fuzz:
    """As a source of images, read in each of the ways in which `shards build` reads tars."""
    seeds = _tars()

    def read(content: bytes) -> None:
        for opened in (open_seekable, open_stream):
            with contextlib.suppress(*DAMAGES):
                for member in members(partial(_opened, opened, content)):
                    if member.path.startswith("/"):
                        raise SilentAcceptance("a member outside of its tar")
                    with contextlib.suppress(NotTaken, Lost):
                        image = Content(member)
                        image.use(member.path)
                        image.all()

    return Fuzz(lambda rng: damaged_tar(rng, rng.choice(seeds)), read)


def _opened(opened: Any, content: bytes) -> Any:
    file = io.BytesIO(content)
    if opened is open_stream:
        return open_stream(file, 2**16, lambda kind: None)
    return open_seekable(file, lambda kind: None)


def _tar_head(folder: Path) -> Fuzz:
    """The first samples, from which `shards index` infers what the members are, and which `doctor` reads."""
    seeds, path = _tars(), folder / "s.tar"
    entry = ShardEntry("s.tar", 1, 512, "0" * 64)
    index = ShardIndex(str(folder), _CLASSES, ("jpg", "png"), LabelFormat(), (entry,))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            unreadable(index, Storage())
        infer_fields(read_head(str(path), Storage(), GivenFields()), GivenFields())

    return Fuzz(lambda rng: damaged_tar(rng, rng.choice(seeds)), read)


def _dataset(folder: Path) -> ShardIndex:
    """A dataset of 12 samples in three shards."""
    rng = np.random.default_rng(1)
    for name in _CLASSES:
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(
                folder / "pictures" / name / f"{number}.jpg"
            )
    build_shards(folder / "pictures", folder / "shards", samples_per_shard=4, validation_per_class=1)
    return read_index(folder / "shards" / "train")


def _as_index(value: Any) -> Any:
    """An index with its own digest."""
    shards = tuple(ShardEntry(**entry) for entry in value["shards"])
    label = LabelFormat(**value["fields"]["label"])
    index = ShardIndex(
        value.get("folder") or "", tuple(value["classes"]), tuple(value["fields"]["image"]), label, shards,
        value["labels_per_sample"], value["labels_sha256"],
    )  # fmt: skip
    return value | {"digest": index.digest}


def _index(folder: Path) -> Fuzz:
    """`index.json` with a digest of its own, and everything that a run does with one before it reads a shard."""
    home = Path(_dataset(folder).folder)
    path = home / FILE_NAME
    seed = json.loads(path.read_bytes())
    digest = read_index(home).digest

    def read(content: bytes) -> None:
        path.write_bytes(content)
        index = read_index(home)
        if index.digest == digest:
            return
        sizes = index.shard_samples
        if (
            (sizes < 0).any()
            or int(sizes.sum()) != index.samples
            or not 0 < index.labels_per_sample <= max(1, len(index.classes))
        ):
            raise SilentAcceptance("an index with absurd numbers")
        for number in range(len(index.shards)):
            if not Path(index.location(number)).resolve().is_relative_to(Path(index.folder).resolve()):
                raise SilentAcceptance("a shard outside of the folder of its index")
        dataset = Dataset(index)
        if dataset.samples != index.samples:
            raise SilentAcceptance("a dataset with another number of samples than its index")
        open_dataset(str(home), Storage())
        check_shards(index)
        read_labels(index, Storage())

    return Fuzz(lambda rng: damaged_json(rng, seed, _as_index), read)


def _labels(folder: Path) -> Fuzz:
    """`labels.npy`, with its sha256 in the index made to agree."""
    index = _dataset(folder)
    path = Path(index.folder) / LABELS_NAME
    seeds = [path.read_bytes(), labels_file(np.arange(24, dtype=np.int32).reshape(12, 2) % 3)[0]]

    def mutate(rng: random.Random) -> bytes:
        seed = rng.choice(seeds)
        if rng.randrange(3):
            return damaged_bytes(rng, seed)
        header = {"descr": "<i4", "fortran_order": False, "shape": (12, 1)}
        text = str(damaged_value(rng, header | {"shape": [12, 1]})).replace("[", "(").replace("]", ")") + "\n"
        length = len(text.encode(errors="replace")) & 0xFFFF
        return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode(errors="replace") + seed[-48:]

    def read(content: bytes) -> None:
        path.write_bytes(content)
        labels = read_labels(replace(index, labels_sha256=hashlib.sha256(content).hexdigest()), Storage())
        if labels.shape != (12, 1) or labels.min() < -1 or labels.max() > 2:
            raise SilentAcceptance("labels that the index does not have")

    return Fuzz(mutate, read)


def _verification(folder: Path) -> Fuzz:
    """Any change of a shard must be found by `shards verify`, whose index has another sha256."""
    index = _dataset(folder)
    path = Path(index.location(1))
    seed = path.read_bytes()

    def mutate(rng: random.Random) -> bytes:
        return (damaged_tar if rng.randrange(2) else damaged_bytes)(rng, seed)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        if content != seed and not list(verify_shards(index, decode_images=True)):
            raise SilentAcceptance("a changed shard is not reported")

    return Fuzz(mutate, read)


def _label_members(folder: Path) -> Fuzz:
    readers = [LabelReader(label, _CLASSES) for label in _LABEL_FORMATS]

    def mutate(rng: random.Random) -> bytes:
        format_number, seed = rng.randrange(len(readers)), rng.choice(_LABELS)
        content = (
            damaged_json(rng, json.loads('{"label": [1, 2], "a": {"b": 1}}'))
            if rng.randrange(3) == 0
            else damaged_bytes(rng, seed)
        )
        return bytes([format_number]) + content

    def read(content: bytes) -> None:
        labels = readers[content[0]](content[1:])
        if not labels or list(labels) != sorted(set(labels)) or labels[0] < 0 or labels[-1] > 2:
            raise SilentAcceptance("a label that is not in the class list")

    return Fuzz(mutate, read, (ValueError,))


def _images(folder: Path) -> Fuzz:
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 24)).save(turned, "JPEG", exif=exif)
    seeds, regions = [*_pictures(), turned.getvalue()], find_region_decoder()

    def window_of(content: bytes) -> Pixels | None:
        try:
            return decode_window(content, lambda height, width: (slice(0, -(-height // 2)), slice(0, width)), regions)
        except DecodeError:
            return None

    def read(content: bytes) -> None:
        is_turned(content)
        window = window_of(content)
        pixels = decode(content)
        if window is None or not np.array_equal(window, pixels[: -(-len(pixels) // 2)]):
            raise SilentAcceptance("the upper half has other pixels than the whole")
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 3
            or pixels.shape[2] != 3
            or not 0 < pixels.size <= 3 * MAX_PIXELS
        ):
            raise SilentAcceptance("pixels of another shape")

    return Fuzz(lambda rng: damaged_bytes(rng, rng.choice(seeds)), read, (DecodeError,))


def _build_plan(folder: Path) -> Fuzz:
    build = BuildFolder(folder / "out")
    reading = ReadOptions(0, Conversion(), Selection(), 2**20)
    build.begin(BuildPlan("/images", None, reading, WriteOptions(7, None, 0, 0.1, None, False)), None)
    path = build.path / "plan.json"
    seed = json.loads(path.read_bytes())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        build.plan().record(folder / "out")

    return Fuzz(lambda rng: damaged_json(rng, seed), read)


def _build_record(folder: Path) -> Fuzz:
    seed = {
        "source": "/images", "source_beside": "../images", "state": {"bytes": 4, "modified": 9}, "options": {"quality": 95, "seed": 0},
    }  # fmt: skip

    def read(content: bytes) -> None:
        (folder / RECORD_NAME).write_bytes(content)
        read_record(folder)

    return Fuzz(lambda rng: damaged_json(rng, seed), read)


TARGETS = [
    Target("tar-bytes", _tar_bytes),
    Target("tar-headers", _tar_headers),
    Target("tar-source", _tar_source),
    Target("tar-head", _tar_head),
    Target("index", _index),
    Target("labels", _labels),
    Target("verification", _verification),
    Target("label-members", _label_members),
    Target("images", _images),
    Target("build-plan", _build_plan),
    Target("build-record", _build_record),
]
