"""mosaicml-streaming: its own shards that hold the JPEGs as they are, decoded with Pillow in worker processes."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.loaders.task import BATCH, Images, with_pillow
from benchmarks.torchvision_import import import_with_torchvision

streaming: Any = import_with_torchvision("streaming")


class _Crops(streaming.StreamingDataset):  # type: ignore[misc]
    def __init__(self, folder: Path, augmented: bool) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=BATCH)
        self._augmented = augmented

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return with_pillow(sample["image"], self._augmented), sample["label"]


def prepare(folder: Path) -> None:
    with streaming.MDSWriter(
        out=str(folder / "mds"), columns={"image": "bytes", "label": "int"}, size_limit="64mb"
    ) as writer:
        for path in sorted((folder / "images").rglob("*.jpg")):
            writer.write({"image": path.read_bytes(), "label": int(path.parent.name)})


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    loader: Any = DataLoader(
        _Crops(folder / "mds", augmented), BATCH, num_workers=workers, drop_last=True, persistent_workers=True
    )
    return (images for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)))
