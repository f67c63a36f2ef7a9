"""Reading of shards and the sample order, without decoding.

python -m benchmarks.reading                                    tar headers; the order of three billion samples
python -m benchmarks.reading --stream 100000                    memory and order of a stream of samples
python -m benchmarks.reading --local FOLDER --remote URL        S3 against the local disk, with requests of a shard
"""

import argparse
import hashlib
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from webdataset import TarWriter

from benchmarks.jpegs import sample_jpegs
from benchmarks.timing import interleaved, machine, report
from data.building.build import build_shards
from data.dataset import Dataset, open_dataset
from data.images.augment import TrainTransform
from data.images.random_augment import RandomAugment
from data.order import SampleOrder
from data.remote.byte_stream import BUFFER, byte_stream
from data.remote.cache import Cache, RequestedShard
from data.remote.shard_download import download
from data.remote.storage import Storage, open_filesystem
from data.stream import MicroBatch, RankShare, training_stream
from data.tar import read_tar

CPU = torch.device("cpu")

_IN_MEMORY, _FROM_DISK, _REMOTE = "local, memory", "local, disk", "remote"
_HELD = 6
"""Shards that the cache of `--remote` has room for: more than the reader needs at a time, fewer than there are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3_000_000_000, help="of the order")
    parser.add_argument("--stream", type=int, metavar="SAMPLES", help="measure a stream of SAMPLES instead")
    parser.add_argument("--images", type=Path, help="folder of JPEGs for --stream; generated ones if it is not given")
    parser.add_argument("--local", help="folder of shards")
    parser.add_argument("--remote", help="URL of the same shards")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of each turn of --remote, which an epoch ends as well"
    )
    parser.add_argument("--workers", type=int, default=2, help="reader threads of --stream and --remote")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(CPU))
    if arguments.stream:
        report("A stream", _stream(arguments.stream, arguments.images, arguments.workers), arguments.json)
    elif arguments.remote:
        report("Processor time of the parts of a download", _download_parts(arguments.remote, arguments.rounds), None)
        rows = _remote(arguments.local, arguments.remote, arguments.rounds, arguments.seconds, arguments.workers)
        report("Remote shards against local ones, each image downloaded once", rows, arguments.json)
    else:
        report("Headers of a tar of 4,000 samples", _headers(arguments.rounds), None)
        report(f"Positions among {arguments.samples:,} samples", _positions(arguments.samples), arguments.json)


def _headers(rounds: int) -> list[dict[str, Any]]:
    """Finding the samples of a shard: ours and `tarfile`, on tars as we write them and as webdataset does."""
    rows = []
    for kind, mtime in (("whole seconds", 0), ("fractions: a pax header for each member", None)):
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            with TarWriter(file.name, mtime=mtime) as writer:
                for number in range(4000):
                    writer.write({"__key__": f"n01440764/n01440764_{number}", "jpg": b"x" * 20_000, "cls": number})
            timings = interleaved(
                {"ours": partial(_our_members, file.name), "tarfile": partial(_tarfile_members, file.name)},
                rounds=rounds,
                device=CPU,
                clock=time.process_time,
            )
        rows += [
            {
                "times in the headers": kind,
                "reader": name,
                "microseconds a sample": timing.median / 4000 * 1e6,
                "speed": timing.speed_against(timings["tarfile"]),
            }
            for name, timing in timings.items()
        ]
    return rows


def _our_members(path: str) -> int:
    with open(path, "rb") as file:
        return len(read_tar(file.fileno()).members)


def _tarfile_members(path: str) -> int:
    with tarfile.open(path) as archive:
        return sum(member.isfile() for member in archive)


def _positions(samples: int) -> list[dict[str, Any]]:
    """Milliseconds and memory to find any position, for the two usual sizes of shards."""
    rows = []
    for per_shard in (10_000, 3_300):
        shards = max(1, samples // per_shard)
        sizes = np.random.default_rng(0).integers(per_shard * 9 // 10, per_shard * 11 // 10, shards)
        before = psutil.Process().memory_info().rss
        lanes, batch = min(64, samples), 4096
        order = SampleOrder(sizes, seed=0, batch=batch, lanes=lanes, window=8192)
        steps = np.random.default_rng(1).integers(0, 30 * samples // batch, 20).tolist()
        cold: list[float] = []
        again: list[float] = []
        for step in steps:
            start = int(np.random.default_rng(step).integers(batch // 64)) * 64
            for times in (cold, again):
                began = time.perf_counter()
                order.at(step, start, start + 64)
                times.append(1e3 * (time.perf_counter() - began))
        rows.append(
            {
                "samples of a shard": per_shard,
                "shards": shards,
                "first look into an epoch, ms": statistics.median(cold),
                "at most, ms": max(cold),
                "then, ms": statistics.median(again),
                "memory, MB": (psutil.Process().memory_info().rss - before) / 1e6,
            }
        )
    return rows


def _training(
    dataset: Dataset, cache: Cache | None, micro_batch: int, workers: int, lanes: int = 16, window: int = 512
) -> Generator[MicroBatch]:
    order = SampleOrder(dataset.shard_samples, seed=0, batch=64 * lanes, lanes=lanes, window=window)
    return training_stream(
        dataset, order, TrainTransform(224, random_augment=RandomAugment(2, 15.0)), RankShare(0, 1, micro_batch),
        first_step=0, workers=workers, cache=cache,
    )  # fmt: skip


def _stream(samples: int, images: Path | None, workers: int) -> list[dict[str, Any]]:
    """Resident memory along the way, and a digest of the labels' and images' order."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        files = sample_jpegs(images, min(200, samples // 20))
        for number, file in enumerate(files * 20):
            (folder / str(number % 20)).mkdir(parents=True, exist_ok=True)
            (folder / str(number % 20) / f"{number}.jpg").write_bytes(file)
        build_shards(folder, Path(name) / "shards", samples_per_shard=250)
        dataset = open_dataset(f"{name}/shards", Storage())
        rows, seen, digest = [], 0, hashlib.sha256()
        began = time.monotonic()
        for batch in itertools.islice(_training(dataset, None, micro_batch=64, workers=workers), -(-samples // 64)):
            seen += len(batch.labels)
            digest.update(batch.labels.tobytes())
            digest.update(batch.images.tobytes())
            if seen // 64 % max(1, samples // 640) == 0 or seen >= samples:
                rows.append(
                    {
                        "samples": f"{seen:,}",
                        "memory, MB": psutil.Process().memory_info().rss / 1e6,
                        "images per second": seen / (time.monotonic() - began),
                        "sha256 of labels and pixels": digest.hexdigest()[:16],
                    }
                )
    return rows


class _Turn(NamedTuple):
    """What one turn of a stream has taken."""

    images_per_second: float
    reader: float
    """Seconds of processor time of this process for an image."""
    downloader: float = 0.0
    """Those of the downloader for as many bytes as an image has in its shard."""

    @property
    def images_per_cpu_second(self) -> float:
        return 1 / (self.reader + self.downloader)


def _remote(local: str, remote: str, rounds: int, seconds: float, workers: int) -> list[dict[str, Any]]:
    """Local and remote shards in turns; the remote ones come through a cache that is full, as in a long run.

    Local ones are read from memory, as a set can be that is smaller than it, and from the disk, with which the speed is
    compared. Processor time is that of the reader and its downloader, without the server, which runs elsewhere in a
    cluster.
    """
    datasets = {
        _IN_MEMORY: open_dataset(local, Storage()),
        _FROM_DISK: open_dataset(local, Storage()),
        _REMOTE: open_dataset(remote, Storage()),
    }
    turns: dict[str, list[_Turn]] = {kind: [] for kind in datasets}
    for _ in range(rounds):
        for kind, dataset in datasets.items():
            if kind == _FROM_DISK:
                _drop_from_memory(Path(local))
            turns[kind].append(_turn(dataset, kind == _REMOTE, seconds, workers))
    rows = []
    for kind, found in turns.items():
        wall, processor = (
            sorted(
                getattr(own, name) / getattr(other, name) for own, other in zip(found, turns[_FROM_DISK], strict=True)
            )
            for name in ("images_per_second", "images_per_cpu_second")
        )
        rows.append(
            {
                "shards": kind,
                "images per second": statistics.median(turn.images_per_second for turn in found),
                "speed": statistics.median(wall),
                "reader, ms an image": 1e3 * statistics.median(turn.reader for turn in found),
                "downloader": 1e3 * statistics.median(turn.downloader for turn in found),
                "images per CPU second": statistics.median(turn.images_per_cpu_second for turn in found),
                "speed by CPU": statistics.median(processor),
                "from": processor[0],
                "to": processor[-1],
                "requests a shard": _requests_of_a_shard(datasets[kind]) if kind == _REMOTE else 0.0,
            }
        )
    return rows


def _drop_from_memory(folder: Path) -> None:
    """Have the next reads of the shards in `folder` come from the disk."""
    for shard in folder.glob("*.tar"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _turn(dataset: Dataset, is_remote: bool, seconds: float, workers: int) -> _Turn:
    bytes_of_set = sum(shard.bytes for shard in dataset.index.shards)
    room = _HELD * bytes_of_set // len(dataset.index.shards)
    until_full = _HELD * dataset.samples // len(dataset.index.shards)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), room, downloads=8) if is_remote else None
        with closing(_training(dataset, cache, 64, workers, lanes=1, window=max(1, dataset.samples // 32))) as stream:
            first = sum(len(next(stream).labels) for _ in range(0, until_full, 64))
            downloaders = psutil.Process().children()
            began, reader, images = time.monotonic(), time.process_time(), 0
            before = [_cpu_and_written(downloader) for downloader in downloaders]
            # What was read once comes from memory.
            while images == 0 or (time.monotonic() < began + seconds and first + images < dataset.samples):
                images += len(next(stream).labels)
            speed, reader = images / (time.monotonic() - began), (time.process_time() - reader) / images
            after = [_cpu_and_written(downloader) for downloader in downloaders]
    if not is_remote:
        return _Turn(speed, reader)
    (cpu, written), (cpu_before, written_before) = *after, *before
    if written == written_before:
        raise SystemExit("nothing was downloaded: measure for more --seconds, or with more shards")
    per_image = bytes_of_set / dataset.samples
    return _Turn(speed, reader, (cpu - cpu_before) / (written - written_before) * per_image)


def _cpu_and_written(process: psutil.Process) -> tuple[float, int]:
    """Seconds of processor time of a process, and bytes that it has written to files."""
    return sum(process.cpu_times()[:2]), process.io_counters().write_chars


def _requests_of_a_shard(dataset: Dataset) -> float:
    """HTTP requests for each of the first shards of a dataset on S3, retries and questions for sizes included."""
    files = open_filesystem(dataset.index.location(0), dataset.storage)[0]
    files.connect()
    sent: list[str] = []
    files.s3.meta.events.register("before-send.s3", lambda request, **context: sent.append(request.method))
    numbers = range(min(4, len(dataset.index.shards)))
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            assert download(_requested(dataset, number), Path(folder) / "shard")
    return len(sent) / len(numbers)


def _download_parts(remote: str, rounds: int) -> list[dict[str, Any]]:
    """Of the first shard."""
    dataset = open_dataset(remote, Storage())
    shard = _requested(dataset, 0)
    with tempfile.TemporaryDirectory() as folder:
        new, again = Path(folder) / "new", Path(folder) / "again"
        assert download(shard, again)
        content = memoryview(again.read_bytes())
        pieces = [content[start : start + BUFFER] for start in range(0, len(content), BUFFER)]

        def receive() -> None:
            for _ in byte_stream(shard.location, 0, shard.bytes, shard.storage):
                pass

        def write(path: Path, mode: Literal["wb", "rb+"]) -> None:
            if mode == "wb":
                path.unlink(missing_ok=True)
            with open(path, mode) as file:
                for piece in pieces:
                    file.write(piece)
                os.fsync(file.fileno())

        parts: dict[str, Callable[[], object]] = {
            "receiving": receive,
            "sha256": lambda: [hashlib.sha256(piece) for piece in pieces],
            "writing a new file": partial(write, new, "wb"),
            "writing over a file in memory": partial(write, again, "rb+"),
            "the whole download": partial(download, shard, Path(folder) / "shard"),
        }
        timings = interleaved(parts, rounds=4 * rounds, device=CPU, clock=time.process_time)
    return [
        {
            "part": name,
            "ms a MB": 1e9 * timing.median / shard.bytes,
            "from": 1e9 * min(timing.seconds) / shard.bytes,
            "to": 1e9 * max(timing.seconds) / shard.bytes,
        }
        for name, timing in timings.items()
    ]


def _requested(dataset: Dataset, number: int) -> RequestedShard:
    shard = dataset.index.shards[number]
    return RequestedShard(dataset.index.location(number), shard.bytes, shard.sha256, dataset.storage, urgent=True)


if __name__ == "__main__":
    main()
