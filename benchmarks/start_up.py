"""What a start of `coatnet train` takes until its first step, and what it reads; indexes and checkpoints by their size.

python -m benchmarks.start_up                     everything below
python -m benchmarks.start_up --part starts       first and continued start of a small run: seconds, files, bytes
python -m benchmarks.start_up --part index        reading an index, by its number of shards
python -m benchmarks.start_up --part checkpoint   processor time of writing and reading a gigabyte of a checkpoint
python -m benchmarks.start_up --part store        connections to the store of the ranks, by their number

With `--remote s3://BUCKET/FOLDER`, shards and checkpoints of the starts are there, and requests are counted by kind.
Python's own calls are counted, with a hook: those of the dynamic linker are not, but for the libraries that are mapped.
"""

import argparse
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

_PARTS = ("starts", "index", "checkpoint", "store")
_RANK = "--as-rank"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=_PARTS, nargs="+", default=list(_PARTS))
    parser.add_argument("--remote", help="URL of an empty folder of an object store, for shards and checkpoints")
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 40_000], help="sizes of an index")
    parser.add_argument("--megabytes", type=int, default=256, help="of a rank's file of a checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks that meet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    import torch

    from benchmarks.timing import machine, report

    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        if "starts" in arguments.part:
            tables["Starts, one rank"] = starts(Path(name), arguments.rounds, arguments.remote)
        if "index" in arguments.part:
            tables["Reading an index"] = index_reading(Path(name), arguments.shards, arguments.rounds)
        if "checkpoint" in arguments.part:
            tables["A gigabyte of a checkpoint"] = checkpoint_files(Path(name), arguments.megabytes, arguments.rounds)
        if "store" in arguments.part:
            tables["The store of the ranks"] = [store_connections(Path(name), ranks) for ranks in arguments.ranks]
    for title, rows in tables.items():
        report(title, rows, None)
    if arguments.json is not None:
        rows = [{"table": title, **row} for title, found in tables.items() for row in found]
        arguments.json.write_text(json.dumps({"title": "Starts", "rows": rows}, indent=1) + "\n")


def starts(folder: Path, rounds: int, remote: str | None = None) -> list[dict[str, Any]]:
    """A row for each quantity of a first start, and of one that continues from its checkpoint.

    Seconds are the smallest of the rounds, as other programs on the machine only add to them.
    """
    recipe = _recipe(folder / "starts", remote)
    found: dict[str, list[dict[str, float]]] = {"first start": [], "continued": []}
    for number in range(rounds + 1):
        found["continued" if number else "first start"].append(_start(recipe)[0])
    names = dict.fromkeys(name for records in found.values() for record in records for name in record)
    return [
        {"what": name, **{kind: min(record.get(name, 0.0) for record in records) for kind, records in found.items()}}
        for name in names
    ]


def index_reading(folder: Path, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Bytes of an index, and the processor time and memory of reading it, by its number of shards."""
    from data.index import LabelFormat, ShardEntry, ShardIndex, read_index

    rows = []
    for size in sizes:
        home = folder / f"index-{size}"
        home.mkdir()
        # As long as real ones: a name of the build, and hexadecimal digits.
        shards = tuple(ShardEntry(f"train-{n:06d}.tar", 4096, 450_000_000 + n, f"{n:064x}") for n in range(size))
        ShardIndex(str(home), ("one", "two"), ("jpg",), LabelFormat(), shards).write()
        seconds, before = [], psutil.Process().memory_info().rss
        for _ in range(rounds):
            began = time.process_time()
            index = read_index(home)
            _ = index.digest
            seconds.append(time.process_time() - began)
        rows.append(
            {
                "shards": size,
                "bytes a shard": (home / "index.json").stat().st_size / size,
                "processor microseconds a shard": 1e6 * min(seconds) / size,
                "resident bytes a shard": max(0, psutil.Process().memory_info().rss - before) / size,
            }
        )
    return rows


def checkpoint_files(folder: Path, megabytes: int, rounds: int) -> list[dict[str, Any]]:
    """Processor seconds and seconds for each gigabyte of one rank's file, written as saves do and read as starts do."""
    import torch

    from data.files.digest import location_sha256
    from data.remote.storage import Storage
    from pipeline.checkpoints.host_copy import HostFile
    from pipeline.checkpoints.staged import StagedCheckpoint
    from pipeline.checkpoints.store import CheckpointStore

    store = CheckpointStore(str(folder / "checkpoints"), Storage(), folder / "checkpoints")
    size = megabytes * 10**6
    tensors = {f"master.{n}": torch.randn(size // 64 // 4) for n in range(64)}
    file = HostFile(tensors, pinned=False)
    file.fill(tensors)
    found: dict[str, list[tuple[float, float]]] = {"write, flush and read back, hashed": [], "hash": [], "copy": []}

    def timed(what: str, run: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        run()
        found[what].append((time.process_time() - processor, time.perf_counter() - wall))

    name = "rank-00000.safetensors"
    for number in range(rounds):
        staged = StagedCheckpoint(store, number, 1, 0, lambda: None)
        timed("write, flush and read back, hashed", lambda staged=staged: staged.write(name, file.blocks))  # type: ignore[misc]
        (path,) = (folder / "checkpoints").glob(f".step-{number:08d}*/{name}")
        timed("hash", lambda path=path: location_sha256(str(path), path.stat().st_size, Storage()))  # type: ignore[misc]
        timed("copy", lambda path=path: _copied(path, tensors))  # type: ignore[misc]
        path.unlink()
    gigabytes = size / 1e9
    return [
        {
            "what": what,
            "processor seconds a GB": min(processor for processor, _ in times) / gigabytes,
            "seconds a GB": min(wall for _, wall in times) / gigabytes,
        }
        for what, times in found.items()
    ]


def _copied(path: Path, tensors: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        for key, tensor in tensors.items():
            tensor.copy_(opened.get_tensor(key))


def store_connections(folder: Path, ranks: int) -> dict[str, Any]:
    """Connections that the rank which holds the store has at the first step, when ranks of several nodes meet there."""
    recipe = _recipe(folder / f"store-{ranks}", None, ranks)
    record = _start(recipe, ranks)[0]
    return {"ranks": ranks, "connections to the store": record["connections to the store"]}


def _recipe(folder: Path, remote: str | None, ranks: int = 1) -> Path:
    """A recipe of the smallest model, on a few generated images."""
    from benchmarks.jpegs import sample_jpegs
    from data.building.build import build_shards

    for number, file in enumerate(sample_jpegs(None, 32)):
        (folder / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        (folder / "images" / str(number % 2) / f"{number}.jpg").write_bytes(file)
    build_shards(folder / "images", folder / "shards", samples_per_shard=4, validation_per_class=2)
    place = str(folder / "shards")
    if remote is not None:
        from data.remote.storage import Storage, upload

        place = f"{remote}/shards"
        for path in sorted((folder / "shards").rglob("*")):
            if path.is_file():
                upload(path, f"{place}/{path.relative_to(folder / 'shards')}", Storage())
    stage: dict[str, Any] = {
        "resolution": 32,
        "steps": 1_000_000,
        "data": {
            "train": f"{place}/train",
            "validation": f"{place}/validation",
            "lanes": 1,
            "workers": 1,
            "cache": {"folder": str(folder / "cache"), "gigabytes": 1},
        },
        "model": {"name": "coatnet_debug"},
        "batch": {"global_size": 2 * ranks, "micro_size": 2},
        "precision": "fp32",
        "optimizer": {"peak_learning_rate": 1e-4},
        "evaluation": {"every_steps": 10**6},
        "resources": {"ranks": ranks, "gpus_per_rank": 0},
    }
    if remote is not None:
        stage["checkpoint"] = {"folder": f"{remote}/checkpoints"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "start", "stages": {"pretrain": stage}}))
    return path


def _start(recipe: Path, ranks: int = 1) -> list[dict[str, float]]:
    """Start the ranks, and stop them after a step, which saves it; what each of them has counted until then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    records = [recipe.parent / f"record-{rank}.json" for rank in range(ranks)]
    shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank, record in enumerate(records):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.start_up", _RANK, str(recipe), str(record)],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
    for process, record in zip(processes, records, strict=True):
        errors = process.communicate()[1].decode()
        if process.returncode != 75 or not record.exists():
            raise SystemExit(f"the run ended with {process.returncode}: {errors[-2000:]}")
    return [json.loads(record.read_text()) for record in records]


class _Counts:
    """Calls of this process from now on, counted by a hook and by wrappers of the functions that have none."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._read: set[str] = set()
        self._asked: set[str] = set()
        sys.addaudithook(self._note)
        bootstrap: Any = importlib.import_module("_frozen_importlib_external")
        bootstrap._path_stat = self._counted(bootstrap._path_stat)
        os.stat, os.lstat = self._counted(os.stat), self._counted(os.lstat)

    def count_requests(self) -> None:
        """Count those to an object store as well."""
        session_class = importlib.import_module("aiobotocore.httpsession").AIOHTTPSession
        send = session_class.send

        async def counted(session: Any, request: Any) -> Any:
            self.calls[_kind_of(request.method, request.url)] += 1
            return await send(session, request)

        session_class.send = counted

    def read_files(self) -> dict[str, float]:
        """Files that were opened to be read, each once, and their sizes; and the libraries that are mapped."""
        sizes = [os.stat(path).st_size for path in self._read if os.path.isfile(path)]
        libraries: dict[str, int] = {}
        resident = 0.0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and len(words) >= 6 and words[5].startswith("/"):
                mapped = words[5] if ".so" in words[5] else ""
                if mapped and os.path.isfile(mapped):
                    libraries[mapped] = os.stat(mapped).st_size
            elif "-" in words[0]:
                mapped = ""
            elif mapped and words[0] == "Rss:":
                resident += 1024 * int(words[1])
        return {
            "different names asked for": len(self._asked),
            "files read": len(sizes),
            "their megabytes": sum(sizes) / 1e6,
            "libraries mapped": len(libraries),
            "megabytes of the libraries": sum(libraries.values()) / 1e6,
            "of these in memory": resident / 1e6,
        }

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, flags = os.fsdecode(arguments[0]), arguments[2]
            if not path.startswith(("/proc", "/sys", "/dev")):
                self.calls["opened files"] += 1
                if isinstance(flags, int) and flags & os.O_ACCMODE == os.O_RDONLY:
                    self._read.add(os.path.abspath(path))
        elif event in ("os.listdir", "os.scandir"):
            self.calls["listed folders"] += 1

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls["asked for names (stat, lstat)"] += 1
            if isinstance(arguments[0], str | os.PathLike):
                self._asked.add(os.fspath(arguments[0]))
            return function(*arguments, **options)

        return call


def _kind_of(method: str, url: str) -> str:
    """What a request is for, by its method and the object."""
    path, _, query = url.partition("?")
    place = "checkpoint" if "/checkpoints/" in path or "checkpoints%2F" in query else "shards"
    if "list-type" in query:
        return f"requests: LIST {place}"
    name = path.rpartition("/")[2]
    what = "manifest" if name == "manifest.json" else "index" if name == "index.json" else "file"
    return f"requests: {method} {place} {what}"


def _as_rank(recipe: str, record: Path) -> None:
    """Be a rank of the stage, note what its first step took, and stop."""
    counts = _Counts()
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks.setdefault(f"processor seconds, {name}", time.process_time())
        marks.setdefault(f"seconds, {name}", time.time() - psutil.Process().create_time())

    from jobs.__main__ import main as run_command

    stage: Any = importlib.import_module("pipeline.stage")
    train: Any = importlib.import_module("pipeline.train")
    mark("until the imports are done")
    if any(place.startswith("s3") for place in _places(recipe)):
        counts.count_requests()

    def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            mark(name)
            return result

        return call

    def first_step(*arguments: Any) -> Any:
        result = take_step(*arguments)
        mark("until the first step is done")
        if not record.exists():
            own = [c for c in psutil.Process().net_connections("tcp") if c.laddr.port == int(os.environ["MASTER_PORT"])]
            found = {"connections to the store": sum(c.status == psutil.CONN_ESTABLISHED for c in own)}
            record.write_text(json.dumps(marks | counts.read_files() | counts.calls | found))
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    stage.plan_stage = marked(stage.plan_stage, "until the indexes are read")
    stage.join_ranks = marked(stage.join_ranks, "until the ranks have met")
    train.newest_intact = marked(train.newest_intact, "until a checkpoint is found and verified")
    train.build_engine = marked(train.build_engine, "until DeepSpeed has its engine")
    train.TrainingState.load = marked(train.TrainingState.load, "until the checkpoint is loaded")
    take_step = train.TrainingRun.take_step
    train.TrainingRun.take_step = first_step
    record.unlink(missing_ok=True)
    sys.argv = ["coatnet", "train", recipe, "pretrain"]
    run_command()


def _places(recipe: str) -> list[str]:
    stage = yaml.safe_load(Path(recipe).read_text())["stages"]["pretrain"]
    return [stage["data"]["train"], stage.get("checkpoint", {}).get("folder", "")]


if __name__ == "__main__":
    if sys.argv[1:2] == [_RANK]:
        _as_rank(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
