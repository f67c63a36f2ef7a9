"""Streams: pixels depend only on seed, epoch and sample; unusable samples are replaced; evaluation is exact."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from data.building.build import build_shards
from data.dataset import Dataset
from data.errors import DataError
from data.images.augment import EvaluationTransform, TrainTransform
from data.images.color_jitter import ColorJitter
from data.images.decode import DecodeError
from data.images.jpeg import Pixels
from data.images.jpeg_region import RegionDecoder
from data.images.random_augment import RandomAugment
from data.images.random_erasing import RandomErasing
from data.images.region_frame import RegionFrame, Window
from data.images.turbojpeg import TurboJpeg
from data.index import read_index
from data.indexing.index_shards import index_shards
from data.order import SampleOrder
from data.shard import Shard
from data.stream import WHOLE_EVERY, MicroBatch, RankShare, evaluation_stream, training_stream, training_view
from pipeline.training.images import erase
from tests.conftest import with_broken_member
from tests.support.libturbojpeg import libturbojpeg
from tests.support.third_party import write_members


def stream(
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 3,
    first_step: int = 0,
    workers: int = 2,
    transform: TrainTransform | None = None,
    excluded: Collection[str] = (),
    regions: RegionDecoder | None = None,
) -> Iterator[MicroBatch]:
    dataset = Dataset(read_index(folder))
    order = SampleOrder(shard_samples=dataset.shard_samples, seed=5, batch=12, lanes=4, window=10)
    return training_stream(
        dataset, order, transform or TrainTransform(16), RankShare(rank, world_size, micro_batch),
        first_step=first_step, workers=workers, excluded=excluded, regions=regions,
    )  # fmt: skip


def pixels_of(batches: list[MicroBatch]) -> np.ndarray:
    return np.concatenate([batch.images for batch in batches])


def erased_pixels_of(batches: list[MicroBatch]) -> np.ndarray:
    """With what is to be erased put in, as if there were no normalization."""
    pictures = []
    for batch in batches:
        images = torch.from_numpy(batch.images).float()
        erase(images, batch.erased)
        pictures.append(images.numpy())
    return np.concatenate(pictures)


@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 6), (2, 3), (2, 6), (4, 3), (12, 1)])
def test_a_step_has_the_same_pixels_on_any_cluster_shape_and_after_any_restart(
    shards: Path, workers: int, micro_batch: int, world_size: int
) -> None:
    transform = TrainTransform(
        16,
        random_augment=RandomAugment(2, 15.0),
        color_jitter=ColorJitter(0.4, 0.4, 0.4, 0.1),
        random_erasing=RandomErasing(0.5, "pixel", 2),
    )
    reference = erased_pixels_of(list(itertools.islice(stream(shards / "train", transform=transform), 24)))  # 6 steps
    per_rank = 12 // world_size // micro_batch
    shares = []
    for rank in range(world_size):
        batches = stream(
            shards / "train",
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            first_step=4,
            workers=workers,
            transform=transform,
        )
        shares.append(list(itertools.islice(batches, 2 * per_rank)))
    for step in range(2):
        parts = [share[step * per_rank : (step + 1) * per_rank] for share in shares]
        together = erased_pixels_of([batch for part in parts for batch in part])
        assert np.array_equal(together, reference[(4 + step) * 12 : (5 + step) * 12])


def test_erasing_changes_neither_the_other_draws_nor_all_images(shards: Path) -> None:
    plain = list(itertools.islice(stream(shards / "train"), 12))
    erasing = TrainTransform(16, random_erasing=RandomErasing(0.5))
    erased = list(itertools.islice(stream(shards / "train", transform=erasing), 12))
    assert np.array_equal(pixels_of(erased), pixels_of(plain))
    changed = (erased_pixels_of(erased) != pixels_of(plain)).any(axis=(1, 2, 3))
    assert 0.2 < changed.mean() < 0.8


def test_micro_batches_record_the_ordered_and_the_used_samples(shards: Path, tmp_path: Path) -> None:
    damaged = with_broken_member(shards, tmp_path / "damaged", broken=2)
    names: dict[tuple[int, int], tuple[str, str]] = {}
    for folder in (shards / "train", damaged):
        index = read_index(folder)
        order = SampleOrder(shard_samples=Dataset(index).shard_samples, seed=5, batch=12, lanes=4, window=10)
        for number, batch in enumerate(itertools.islice(stream(folder, micro_batch=12), 4)):
            ordered = order.at(number, 0, 12)
            assert [(o.epoch, o.id) for o in batch.origins] == list(zip(ordered.epoch, ordered.id, strict=True))
            assert [o.shard for o in batch.origins] == [index.shards[shard].name for shard in ordered.shard]
            broken = {skipped.position for skipped in batch.skipped}
            for position, origin in enumerate(batch.origins):
                name = (origin.shard, origin.key)
                usual = names.setdefault((origin.epoch, origin.id), name)
                assert (usual == name) == (position not in broken)


class WholePictures(RegionDecoder):
    """Decodes no window: every picture is decoded whole."""

    def __call__(self, encoded: bytes, frame: RegionFrame, window: Window) -> Pixels | None:
        return None


@pytest.mark.parametrize("crop", ["random", "distorted_bounding_box", "whole"])
def test_decoding_crops_alone_changes_no_pixel(
    shards: Path, crop: Literal["random", "distorted_bounding_box", "whole"]
) -> None:
    decoded = []

    class Counting(RegionDecoder):
        def __call__(self, encoded: bytes, frame: RegionFrame, window: Window) -> Pixels | None:
            pixels = super().__call__(encoded, frame, window)
            decoded.append(pixels is not None)
            return pixels

    transform = TrainTransform(
        16,
        crop,
        random_augment=RandomAugment(2, 15.0),
        color_jitter=ColorJitter(0.4, 0.4, 0.4, 0.1),
        random_erasing=RandomErasing(0.5, "pixel", 2),
    )
    without, by_simplejpeg, by_libturbojpeg = (
        erased_pixels_of(list(itertools.islice(stream(shards / "train", transform=transform, regions=regions), 64)))
        for regions in (WholePictures(), Counting(), Counting(TurboJpeg(libturbojpeg())))
    )
    assert np.array_equal(without, by_simplejpeg)
    assert np.array_equal(without, by_libturbojpeg)
    assert sum(decoded) > len(decoded) / 3  # without libturbojpeg, some crops need the whole picture


def tall_pictures(count: int) -> list[bytes]:
    """JPEGs so narrow that all random windows are in their middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 400, 16, 3), np.uint8)
    return [simplejpeg.encode_jpeg(one) for one in pixels]


def garbled_below(encoded: bytes) -> bytes:
    return encoded[:-500] + encoded[-480:]


def test_damage_below_the_crops_is_found_in_one_epoch_of_sixteen() -> None:
    (encoded,) = tall_pictures(1)
    garbled, transform = garbled_below(encoded), TrainTransform(16)
    for regions in (RegionDecoder(), RegionDecoder(TurboJpeg(libturbojpeg()))):
        found = []
        for epoch in range(3 * WHOLE_EVERY):
            try:
                view = training_view(garbled, transform, 7, epoch, 30, regions)
            except DecodeError:
                found.append(epoch)
                continue
            assert np.array_equal(view, training_view(encoded, transform, 7, epoch, 30, WholePictures()))
        assert found == [11, 27, 43]  # 7 + epoch + 30 is a multiple of 16


def test_pictures_that_an_index_did_not_decode_are_decoded_whole(tmp_path: Path) -> None:
    encoded = tall_pictures(12)
    encoded[0] = garbled_below(encoded[0])
    members = [m for n, image in enumerate(encoded) for m in ((f"{n}.jpg", image), (f"{n}.cls", b"0"))]
    write_members(tmp_path / "in.tar", members)

    def epochs_without_it() -> list[int]:
        return [n // 4 for n, batch in enumerate(itertools.islice(stream(tmp_path), 4 * WHOLE_EVERY)) if batch.skipped]

    index = index_shards([str(tmp_path)]).index
    assert epochs_without_it() == list(range(16))
    replace(index, images_decode=True).write()
    assert epochs_without_it() == [11]  # seed 5 + epoch 11 + id 0


def test_labels_belong_to_their_images(shards: Path) -> None:
    # The three kinds of image differ in brightness and in contrast, whatever the crop.
    for batch in itertools.islice(stream(shards / "train"), 8):
        for image, label in zip(batch.images, batch.labels, strict=True):
            assert label.tolist() == [0 if image.min() > 120 else 2 if image.max() > 130 else 1]


def test_a_sample_that_does_not_decode_is_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    folder = with_broken_member(shards, tmp_path / "train", broken=6)
    whole = list(itertools.islice(stream(shards / "train"), 16))
    damaged = list(itertools.islice(stream(folder), 16))
    skipped = [sample for batch in damaged for sample in batch.skipped]
    assert {sample.shard for sample in skipped} == {"train-000001.tar"}
    assert len({sample.key for sample in skipped}) == 1
    changed = sum(
        not np.array_equal(a, b)
        for x, y in zip(whole, damaged, strict=True)
        for a, b in zip(x.images, y.images, strict=True)
    )
    assert changed == len(skipped) > 0
    assert np.array_equal(pixels_of(damaged), pixels_of(list(itertools.islice(stream(folder, workers=1), 16))))


def test_an_excluded_sample_is_replaced_as_one_that_does_not_decode(shards: Path, tmp_path: Path) -> None:
    folder = with_broken_member(shards, tmp_path / "train", broken=6)
    damaged = list(itertools.islice(stream(folder), 16))
    (name,) = {f"{one.shard}/{one.key}" for batch in damaged for one in batch.skipped}
    excluding = list(itertools.islice(stream(shards / "train", excluded={name}), 16))
    assert np.array_equal(pixels_of(excluding), pixels_of(damaged))
    assert [b.origins for b in excluding] == [b.origins for b in damaged]
    skipped = [one for batch in excluding for one in batch.skipped]
    assert [(one.position, one.key) for one in skipped] == [
        (one.position, one.key) for b in damaged for one in b.skipped
    ]
    assert all(one.excluded and "data.excluded_samples" in one.reason for one in skipped)


def test_a_shard_without_usable_samples_stops_the_stream(tmp_path: Path) -> None:
    (tmp_path / "source" / "only").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / "source" / "only" / f"{number}.jpg")
    build_shards(tmp_path / "source", tmp_path / "shards")
    path = tmp_path / "shards" / read_index(tmp_path / "shards").shards[0].name
    path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", b"\x00\x00\x00"))
    with pytest.raises(DataError, match="12 of its 12 samples were tried and all are unusable"):
        next(stream(tmp_path / "shards"))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 4), (3, 2)])
def test_evaluation_reads_every_sample_once(shards: Path, world_size: int, micro_batch: int) -> None:
    dataset = Dataset(read_index(shards / "validation"))
    counted = []
    for rank in range(world_size):
        batches = evaluation_stream(
            dataset,
            EvaluationTransform(16, "whole"),
            RankShare(rank, world_size, micro_batch),
            workers=2,
        )
        counted += [
            label for batch in batches for (label,), weight in zip(batch.labels, batch.weights, strict=True) if weight
        ]
    assert sorted(counted) == [0] * 5 + [1] * 5 + [2] * 5


def test_evaluation_gives_a_broken_sample_no_weight_and_names_it(shards: Path, tmp_path: Path) -> None:
    dataset = Dataset(read_index(with_broken_member(shards, tmp_path / "train", broken=2)))
    batches = list(evaluation_stream(dataset, EvaluationTransform(16), RankShare(0, 1, 4), workers=1))
    assert sum(batch.weights.sum() for batch in batches) == dataset.samples - 1
    assert len([sample for batch in batches for sample in batch.skipped]) == 1


def test_shards_that_lanes_read_alternately_stay_open(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_shards(pictures, tmp_path / "small", samples_per_shard=1)
    opened: list[Path] = []

    class Counted(Shard):
        def __init__(self, path: Path, *arguments: Any) -> None:
            opened.append(path)
            super().__init__(path, *arguments)

    monkeypatch.setattr("data.sample_reader.Shard", Counted)
    list(itertools.islice(stream(tmp_path / "small"), 60))  # three epochs
    assert len(opened) == 60
