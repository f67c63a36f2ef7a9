"""FFCV: one file that holds all images, read and decoded by compiled threads.

The file holds the bytes of the JPEGs as they are. FFCV would encode them again, in 4:2:0, which decodes faster.
It has no RandAugment: Pillow's runs as a module in its pipeline, in its one Python thread.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor
from ffcv.writer import DatasetWriter
from PIL import Image

from benchmarks.loaders.task import AREA, BATCH, SIZE, Images, augmented_with_pillow


class _OriginalField(RGBImageField):  # type: ignore[misc]
    """Takes the path of a JPEG, whose bytes it stores."""

    def encode(self, destination: Any, path: Path, malloc: Callable[[int], tuple[int, Any]]) -> None:
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
        with Image.open(path) as image:
            destination["width"], destination["height"] = image.size
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["data_ptr"], storage = malloc(encoded.nbytes)
        storage[:] = encoded


class _Files:
    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Path, int]:
        return self._paths[number], int(self._paths[number].parent.name)


class _RandomAugment(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([augmented_with_pillow(image) for image in images.numpy()]))


def prepare(folder: Path) -> None:
    writer = DatasetWriter(
        str(folder / "images.beton"), {"image": _OriginalField(), "label": IntField()}, num_workers=1
    )
    writer.from_indexed_dataset(_Files(folder / "images"))


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=AREA), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        str(folder / "images.beton"), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=True, custom_fields={"image": RGBImageField},
        pipelines={
            "image": [*image, _RandomAugment()] if augmented else image,
            "label": [IntDecoder(), ToTensor()],
        },
    )  # fmt: skip
    return (images for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)))
