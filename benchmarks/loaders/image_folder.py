"""torch's DataLoader over a folder of files: worker processes, decoding with Pillow."""

import itertools
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.loaders.task import BATCH, Images, with_pillow


class _ImageFolder(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, folder: Path, augmented: bool) -> None:
        self._paths = sorted(folder.rglob("*.jpg"))
        self._augmented = augmented

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path = self._paths[number]
        return with_pillow(path.read_bytes(), self._augmented), int(path.parent.name)


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    loader = DataLoader(
        _ImageFolder(folder / "images", augmented), BATCH, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=True,
    )  # fmt: skip
    return (images for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)))
