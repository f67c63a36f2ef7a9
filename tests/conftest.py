"""What tests of several folders share."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.build import build_shards

# Before DeepSpeed is imported anywhere.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
CLASSES = ("bright", "dark", "striped")


def write_pictures(folder: Path, per_class: int, size: int = 24, seed: int = 0) -> Path:
    """A folder of class folders of JPEGs that a small network can tell apart."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 80, (size, size, 3))
            if name == "bright":
                pixels += 150
            elif name == "striped":
                pixels[:, ::4] += 170
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:04d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEGs in three class folders; read only."""
    return write_pictures(tmp_path_factory.mktemp("source") / "pictures", per_class=20)


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as shards of 7, `train` (45) and `validation` (15); read only."""
    destination = tmp_path_factory.mktemp("shards") / "shards"
    build_shards(pictures, destination, samples_per_shard=7, validation_per_class=5)
    return destination
