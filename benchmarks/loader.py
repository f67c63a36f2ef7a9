"""Our reader against the usual ones, with RandAugment (2, 15) at 224 pixels, in processor time and wall time.

python -m benchmarks.loader --images DIR
"""

import argparse
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.jpegs import sample_jpegs
from benchmarks.pillow_transform import pillow_transform
from benchmarks.timing import cpu_seconds, machine, report
from data.building.build import build_shards
from data.dataset import Dataset
from data.images.augment import TrainTransform
from data.images.decode import decode
from data.images.jpeg_region import RegionDecoder, find_region_decoder
from data.images.random_augment import RandomAugment
from data.index import read_index
from data.order import SampleOrder
from data.stream import RankShare, training_stream

SIZE = 224
BATCH = 64
LAYERS, MAGNITUDE = 2, 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; generated ones if it is not given")
    parser.add_argument("--limit", type=int, default=200, help="JPEGs at most")
    parser.add_argument("--copies", type=int, default=10, help="how often each JPEG is in the shards")
    parser.add_argument("--batches", type=int, default=24, help="batches that are timed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        batches = LOADERS[arguments.measure](arguments.folder, arguments.workers)
        print(json.dumps(_measure(batches, arguments.batches, warm_up=4 * arguments.workers)))
        return
    files = sample_jpegs(arguments.images, arguments.limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, files, arguments.copies)
        print(
            f"{machine(torch.device('cpu'))}; {len(files)} JPEGs of {sum(map(len, files)) / len(files) / 1e3:.0f} KB, "
            f"{arguments.workers} workers, batch {BATCH}; JPEGs in ours by {find_region_decoder()}"
        )
        results: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
        for _, loader in itertools.product(range(arguments.rounds), LOADERS):
            results[loader].append(_in_own_process(loader, folder, arguments))
    plain = [rates["images_per_cpu_second"] for rates in results["webdataset, Pillow"]]
    rows = []
    for loader, rounds in results.items():
        by_cpu = [rates["images_per_cpu_second"] for rates in rounds]
        rows.append(
            {
                "loader": loader,
                "images per CPU second": statistics.median(by_cpu),
                "images per second": statistics.median(rates["images_per_second"] for rates in rounds),
                "speed": statistics.median(a / b for a, b in zip(by_cpu, plain, strict=True)),
            }
        )
    report("Loaders; speed is by processor time", rows, arguments.json)


def _write(folder: Path, files: list[bytes], copies: int) -> None:
    """`copies` of the files as a folder of ten class folders, and as our shards."""
    for number in range(10):
        (folder / "images" / str(number)).mkdir(parents=True)
    for number, (copy, file) in enumerate(itertools.product(range(copies), files)):
        (folder / "images" / str(number % 10) / f"{number}-{copy}.jpg").write_bytes(file)
    build_shards(folder / "images", folder / "shards", samples_per_shard=200)


def _in_own_process(loader: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable, "-m", "benchmarks.loader", "--measure", loader, "--folder", str(folder),
        "--workers", str(arguments.workers), "--batches", str(arguments.batches),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def _measure(batches: Iterator[object], count: int, warm_up: int) -> dict[str, float]:
    """Rates over `count` batches, after `warm_up` batches that start workers and fill queues."""
    torch.set_num_threads(1)
    for _ in range(warm_up):
        next(batches)
    began, cpu_began = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    cpu, wall = cpu_seconds() - cpu_began, time.perf_counter() - began
    return {"images_per_cpu_second": count * BATCH / cpu, "images_per_second": count * BATCH / wall}


def _ours(
    folder: Path, workers: int, regions: RegionDecoder | None = None, crops_alone: bool = True
) -> Iterator[object]:
    dataset = Dataset(replace(read_index(folder / "shards"), images_decode=crops_alone))
    # Few samples make few lanes: about as many for each shard as a large run has.
    order = SampleOrder(shard_samples=dataset.shard_samples, seed=0, batch=4 * BATCH, lanes=4, window=8192)
    return training_stream(
        dataset, order, TrainTransform(SIZE, random_augment=RandomAugment(LAYERS, MAGNITUDE)), RankShare(0, 1, BATCH),
        first_step=0, workers=workers, regions=regions,
    )  # fmt: skip


def _webdataset(folder: Path, workers: int, to_tensor: Callable[[bytes], torch.Tensor]) -> Iterator[object]:
    """As in its documentation: shards and samples shuffled, batches made in worker processes."""
    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    samples = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(to_tensor, int)
        .batched(BATCH)
    )
    return iter(webdataset.WebLoader(samples, num_workers=workers, batch_size=None))


def _pillow_tensor(encoded: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    image = pillow_transform(image, SIZE, (LAYERS, MAGNITUDE), np.random.default_rng())
    return torch.from_numpy(np.array(image))


def _our_tensor(encoded: bytes) -> torch.Tensor:
    transform = TrainTransform(SIZE, random_augment=RandomAugment(LAYERS, MAGNITUDE))
    return torch.from_numpy(transform(decode(encoded), np.random.default_rng()))


class _ImageFolder(TorchDataset[tuple[torch.Tensor, int]]):
    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path = self._paths[number]
        return _pillow_tensor(path.read_bytes()), int(path.parent.name)


def _image_folder(folder: Path, workers: int) -> Iterator[object]:
    loader = DataLoader(
        _ImageFolder(folder / "images"), BATCH, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=True,
    )  # fmt: skip
    return itertools.chain.from_iterable(itertools.repeat(loader))


LOADERS: dict[str, Callable[[Path, int], Iterator[object]]] = {
    "ours": _ours,
    "ours, without libturbojpeg": lambda folder, workers: _ours(folder, workers, RegionDecoder()),
    "ours, whole pictures": lambda folder, workers: _ours(folder, workers, crops_alone=False),
    "webdataset, our transform": lambda folder, workers: _webdataset(folder, workers, _our_tensor),
    "webdataset, Pillow": lambda folder, workers: _webdataset(folder, workers, _pillow_tensor),
    "DataLoader over a folder, Pillow": _image_folder,
}


if __name__ == "__main__":
    main()
