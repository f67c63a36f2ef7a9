"""litdata: chunks that hold the JPEGs as they are, decoded with Pillow in worker processes."""

import itertools
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks.loaders.task import BATCH, Images, with_pillow


class _Crops(StreamingDataset):  # type: ignore[misc]
    def __init__(self, folder: Path, augmented: bool) -> None:
        super().__init__(str(folder), shuffle=True, drop_last=True)
        self._augmented = augmented

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return with_pillow(sample["image"], self._augmented), sample["label"]


def prepare(folder: Path) -> None:
    optimize(
        _sample, sorted(map(str, (folder / "images").rglob("*.jpg"))), str(folder / "litdata"), num_workers=1,
        chunk_bytes="64MB", verbose=False,
    )  # fmt: skip


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    loader = StreamingDataLoader(
        _Crops(folder / "litdata", augmented), batch_size=BATCH, num_workers=workers, drop_last=True,
        persistent_workers=True,
    )  # fmt: skip
    return (images for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)))


def _sample(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).parent.name)}
