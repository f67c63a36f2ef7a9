"""Our reader against what one would take instead, with and without RandAugment (2, 15) at 224 pixels.

    python -m benchmarks.loader --images DIR
    python -m benchmarks.loader --images DIR --loaders ours DALI

A loader that cannot be imported is a line that says so: the project does not depend on those other than webdataset
and torch's DataLoader.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.jpegs import sample_jpegs
from benchmarks.loaders.contestants import BASELINE, CONTESTANTS, versions
from benchmarks.loaders.measurement import measure
from benchmarks.loaders.task import BATCH, SAMPLES_PER_SHARD
from benchmarks.timing import machine, report
from data.building.build import build_shards

Results = dict[tuple[str, str], list[dict[str, float]]]
"""By loader and whether it applied RandAugment ("no" or "yes"), round by round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; generated ones if it is not given")
    parser.add_argument("--limit", type=int, default=200, help="JPEGs at most")
    parser.add_argument("--copies", type=int, default=10, help="how often each JPEG is in the shards")
    parser.add_argument("--batches", type=int, default=24, help="batches that are timed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--augment", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="RandAugment")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        print(json.dumps(_prepare(arguments.prepare, arguments.folder)))
    elif arguments.measure:
        print(json.dumps(_measure(arguments)))
    else:
        _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    files = sample_jpegs(arguments.images, arguments.limit)
    names = [name for name in CONTESTANTS if name in arguments.loaders or name == BASELINE]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, files, arguments.copies)
        print(
            f"{machine(torch.device('cpu'))}; {len(files)} JPEGs of {sum(map(len, files)) / len(files) / 1e3:.0f} KB, "
            f"{arguments.workers} workers, batch {BATCH}"
        )
        missing = {}
        for name in (name for name in names if CONTESTANTS[name].optional):
            if reason := _in_own_process(arguments, folder, "--prepare", name)["missing"]:
                missing[name] = str(reason)
        results: Results = {}
        present = [name for name in names if name not in missing]
        print(versions(present), flush=True)
        for _, kind, name in itertools.product(range(arguments.rounds), arguments.augment, present):
            rates = _in_own_process(arguments, folder, "--measure", name, "--augment", kind)
            results.setdefault((name, kind), []).append(rates)
    rows = [
        _missing_row(name, missing[name]) if name in missing else _row(name, kind, results)
        for name in names
        for kind in (arguments.augment if name not in missing else ["no"])
    ]
    report("Loaders; speed is against webdataset with Pillow", rows, arguments.json)


def _write(folder: Path, files: list[bytes], copies: int) -> None:
    """`copies` of the files as a folder of ten class folders, and as our shards."""
    for number in range(10):
        (folder / "images" / str(number)).mkdir(parents=True)
    for number, (copy, file) in enumerate(itertools.product(range(copies), files)):
        (folder / "images" / str(number % 10) / f"{number}-{copy}.jpg").write_bytes(file)
    build_shards(folder / "images", folder / "shards", samples_per_shard=SAMPLES_PER_SHARD)


def _in_own_process(arguments: argparse.Namespace, folder: Path, *options: str) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "benchmarks.loader", *options, "--folder", str(folder), "--began", str(time.monotonic()),
        "--workers", str(arguments.workers), "--batches", str(arguments.batches),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _prepare(name: str, folder: Path) -> dict[str, str | None]:
    try:
        CONTESTANTS[name].prepare(folder)
    except ImportError as error:
        return {"missing": str(error)}
    return {"missing": None}


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    batches = CONTESTANTS[arguments.measure].load()
    return measure(
        lambda: batches(arguments.folder, arguments.workers, arguments.augment == ["yes"]),
        arguments.batches, warm_up=4 * arguments.workers, process_began=arguments.began,
    )  # fmt: skip


def _row(name: str, kind: str, results: Results) -> dict[str, Any]:
    rounds, baseline = results[name, kind], results[BASELINE, kind]

    def median(key: str) -> float:
        return statistics.median(rates[key] for rates in rounds)

    def speed(key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(rounds, baseline, strict=True))

    return {
        "loader": name,
        "RandAugment": CONTESTANTS[name].random_augment if kind == "yes" else "no",
        "images per CPU second": median("images_per_cpu_second"),
        "speed": speed("images_per_cpu_second"),
        "images per second": median("images_per_second"),
        "speed by the clock": speed("images_per_second"),
        "MiB": median("mebibytes"),
        "first batch, s": median("first_batch"),
    }


def _missing_row(name: str, reason: str) -> dict[str, Any]:
    columns = ("images per CPU second", "speed", "images per second", "speed by the clock", "MiB", "first batch, s")
    return {"loader": name, "RandAugment": f"cannot be imported: {reason}"} | dict.fromkeys(columns, "")


if __name__ == "__main__":
    main()
