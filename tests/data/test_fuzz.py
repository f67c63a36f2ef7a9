"""Random damage to shards, indexes and images is reported or skipped, without a hang, a crash, or another order."""

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.images.augment import TrainTransform
from data.index import read_index
from data.order import SampleOrder
from data.remote.storage import Storage
from data.stream import MicroBatch, RankShare, training_stream

Result = TypeVar("Result")


def one_epoch(dataset: Dataset) -> list[MicroBatch]:
    order = SampleOrder(dataset.shard_samples, seed=3, batch=9, lanes=3, window=20)
    stream = training_stream(
        dataset, order, TrainTransform(8, crop="whole", flip=False), RankShare(0, 1, 9), first_step=0,
        workers=2,
    )  # fmt: skip
    found = list(itertools.islice(stream, 5))
    stream.close()
    return found


def damage(path: Path, seed: int) -> None:
    """Invert bits, overwrite a stretch, or cut the file, anywhere."""
    rng = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 20])):
        place = rng.randrange(len(content))
        kind = rng.choice(["flip", "flip", "stretch", "cut"])
        if kind == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif kind == "stretch":
            length = rng.randrange(1, 3000)
            content[place : place + length] = rng.randbytes(len(content[place : place + length]))
        else:
            content = content[: max(1, place)]
    path.write_bytes(content)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """What `action` gives, or the message with which the data is refused."""
    try:
        return action(), ""
    except DataError as error:
        return None, str(error)


@pytest.fixture(scope="module")
def whole(shards: Path) -> list[MicroBatch]:
    return one_epoch(Dataset(read_index(shards / "train")))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_shards_are_skipped_or_reported_and_the_order_is_kept(
    seed: int, shards: Path, whole: list[MicroBatch], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards / "train", tmp_path / "train"))
    index = read_index(folder)
    damage(folder / index.shards[seed % len(index.shards)].name, seed)
    found, refusal = attempt(lambda: one_epoch(Dataset(index)))
    if found is None:
        assert str(folder) in refusal
        return
    damaged = {sample.position + 9 * step for step, batch in enumerate(found) for sample in batch.skipped}
    before, after = (np.concatenate([b.images for b in batches]) for batches in (whole, found))
    changed = {n for n in range(45) if not np.array_equal(before[n], after[n])}
    # A flipped bit inside a JPEG may still decode; then it is the same sample with an artefact, in its place. All
    # changes are in the damaged shard.
    order = SampleOrder(index.shard_samples, seed=3, batch=9, lanes=3, window=20)
    of_shard = {
        9 * step + n for step in range(5) for n, shard in enumerate(order.at(step, 0, 9).shard) if shard == seed % 7
    }
    assert changed | damaged <= of_shard


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_index_is_reported_or_unchanged(seed: int, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    shutil.copy(shards / "train" / "index.json", tmp_path / "train")
    damage(tmp_path / "train" / "index.json", seed)
    index, refusal = attempt(lambda: read_index(tmp_path / "train"))
    if index is None:
        assert str(tmp_path / "train") in refusal
    else:
        assert index.digest == read_index(shards / "train").digest
        assert index.folder == str(tmp_path / "train")


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_label_map_is_reported_or_read(seed: int, shards: Path, tmp_path: Path) -> None:
    label_map = tmp_path / "map.yaml"
    label_map.write_text("rename: {bright: light, dark: night}\nothers: keep\nclasses: [light, night, striped]\n")
    damage(label_map, seed)
    dataset, refusal = attempt(lambda: open_dataset(str(shards / "train"), Storage(), label_map))
    assert "map.yaml" in refusal or (dataset is not None and dataset.samples == 45)
