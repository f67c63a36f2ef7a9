"""What grows with the ranks: laws by hand, and the program's own work, counted at sizes that a test can have."""

import os
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.files.file_sizes import CONCURRENT_LOOKS
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.order import SampleOrder, default_lanes
from data.remote import storage
from data.remote.storage import Storage
from pipeline.checkpoints import staged
from pipeline.checkpoints.manifest import RankRecord
from pipeline.checkpoints.staged import StagedCheckpoint
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError
from pipeline.planner.cluster_figures import bundled_cluster_figures
from pipeline.planner.failures.run_timing import pruning_seconds, publishing_seconds
from pipeline.planner.scaling import run_loads, start_loads
from pipeline.planner.scaling.limits import limits, loads
from pipeline.planner.scaling.load import Basis, ScaledRun, lanes_of_nodes, lanes_of_ranks
from pipeline.ranks.rendezvous import STORE_CONNECTIONS
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3 import S3Server

RUN = ScaledRun(
    parameters=10**9,
    tensors=500,
    state_bytes=12e9,
    zero_stage=2,
    batch=4096,
    samples=3 * 10**9,
    sample_bytes=1e5,
    shards=700_000,
    interval=1000,
    step_seconds=lambda ranks: 256 / ranks,
)
FIGURES = bundled_cluster_figures()


def demand(run: ScaledRun, ranks: int, name: str) -> float:
    (found,) = (load.demand for load in loads(run, ranks) if load.name == name)
    return found


@pytest.mark.parametrize("ranks", [1, 4, 8, 64, 512, 1024, 4096])
@pytest.mark.parametrize("lanes", [None, 512, 4096])
def test_nodes_read_the_lanes_that_the_order_gives_them(ranks: int, lanes: int | None) -> None:
    count = lanes or default_lanes(RUN.batch, RUN.samples)
    # Of one shard and one window each.
    order = SampleOrder(shard_samples=np.full(count, 200), seed=0, batch=RUN.batch, lanes=count, window=200)
    node = RUN.batch // ranks * min(8, ranks)
    read = [order.shards_ahead(0, start, start + node, 1)[0] for start in range(0, RUN.batch, node)]
    assert lanes_of_nodes(replace(RUN, lanes=lanes), ranks) == sum(map(len, read))


def test_ranks_share_lanes() -> None:
    assert [lanes_of_ranks(RUN, ranks) for ranks in (1, 64, 4096)] == [64, 64, 4096]
    with pytest.raises(ConfigError, match="3 ranks do not divide the 4,096 samples"):
        lanes_of_ranks(RUN, 3)


def test_pieces_are_those_of_the_program() -> None:
    for read in (start_loads._state, run_loads._save_gets):
        one, two = (
            read(replace(RUN, remote=True, state_bytes=size), 1).demand for size in (storage.PIECE, storage.PIECE + 1)
        )
        assert two == one + 1
    assert run_loads._PART == storage._PART
    assert [run_loads.upload_requests(size) for size in (1, storage._PART, storage._PART + 1)] == [1, 1, 4]


def test_an_index_is_as_large_as_the_figure_says(tmp_path: Path) -> None:
    shards = tuple(ShardEntry(f"train-{n:06d}.tar", 4096, 450_000_000 + n, f"{n:064x}") for n in range(1000))
    ShardIndex(str(tmp_path), ("one",), ("jpg",), LabelFormat(), shards).write()
    size = (tmp_path / "index.json").stat().st_size
    assert start_loads.index_bytes(replace(RUN, shards=1000)) == pytest.approx(size, rel=0.01)


class _Counted:
    """A save of several ranks, one after the other, and the leader's part of it."""

    def __init__(self, location: str, scratch: Path, ranks: int) -> None:
        store = CheckpointStore(location, Storage(), scratch)
        self.ranks = [StagedCheckpoint(store, 7, 1, rank, lambda: None) for rank in range(ranks)]
        self.records = {}
        for rank, one in enumerate(self.ranks):
            name = f"rank-{rank:05d}.safetensors"
            self.records[rank] = RankRecord({name: one.write(name, [memoryview(b"state")])}, ())
            if rank:
                one.write_record(self.records[rank])

    def publish(self) -> None:
        """What the leader does with the records of the others."""
        found = self.ranks[0].records(set(range(1, len(self.ranks))))
        assert len(found) == len(self.ranks) - 1
        files = {name: entry for record in self.records.values() for name, entry in record.files.items()}
        self.ranks[0].publish(_Manifest(files))  # type: ignore[arg-type]


class _Manifest:
    """As much of a manifest as publishing needs."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = files

    def as_json(self) -> dict[str, Any]:
        return {}


def test_the_leader_asks_three_times_for_each_rank_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += "rank-" in str(arguments[0])
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    found = []
    for ranks in (2, 5):
        save = _Counted(str(tmp_path / str(ranks)), tmp_path / str(ranks), ranks)
        with monkeypatch.context():
            for name in ("stat", "unlink", "open"):
                counted(os, name)
            calls.clear()
            save.publish()
            found.append(sum(calls.values()))
        monkeypatch.undo()
    assert (found[1] - found[0]) / 3 == 3
    saves, limits = FIGURES.saves, FIGURES.limits
    looks = 2000 / limits.file_operations.value  # more than the file system does with 32 at a time
    assert publishing_seconds(1000, remote=False) == 1000 * saves.file_seconds.value + looks


@pytest.mark.slow
def test_the_leader_makes_three_requests_for_each_rank_in_an_object_store(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._filesystem.cache_clear()
        found, written = [], []
        for ranks in (2, 5):
            proxy.requests.clear()
            save = _Counted(f"s3://test/scaling-{ranks}", tmp_path / str(ranks), ranks)
            written.append(proxy.requests.copy())
            proxy.requests.clear()
            save.publish()
            found.append([method for method, path in proxy.requests if "rank-" in path and "list-type" not in path])
        storage._filesystem.cache_clear()
    counts = [Counter(methods) for methods in found]
    assert {method: (counts[1][method] - counts[0][method]) / 3 for method in counts[1]} == {
        "HEAD": 1, "GET": 1, "DELETE": 1,
    }  # fmt: skip
    # Each rank: its file, read back, and between two looks for a manifest its record.
    own = [Counter(method for method, _ in requests) for requests in written]
    assert {method: (own[1][method] - own[0][method]) / 3 for method in own[1]} == {"PUT": 2, "GET": 3}
    assert not [path for requests in written for _, path in requests if "list-type" in path]
    small = replace(RUN, remote=True, state_bytes=1000.0)
    assert demand(small, 512, "requests of a save that read") == 512 * (3 + 2)
    assert demand(small, 512, "requests of a save that write") == 512 * (2 + 1)
    pages, saves = 2 * 2 + 1, FIGURES.saves
    answered = pages * saves.request_seconds.value + 3000 * saves.request_processor_seconds.value
    assert publishing_seconds(1000, remote=True) == pytest.approx(answered)


def test_the_leader_reads_and_removes_records_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = _Counted(str(tmp_path), tmp_path, 5)

    def waiting(real: Any, others: threading.Barrier, *arguments: Any) -> Any:
        others.wait()
        return real(*arguments)

    for name in ("read_bytes", "remove"):
        others = threading.Barrier(4, timeout=60)  # passed only if there are four calls at a time
        monkeypatch.setattr(staged, name, partial(waiting, getattr(staged, name), others))
    save.publish()
    assert sorted(path.name for path in (tmp_path / "step-00000007").iterdir()) == [
        "manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(5)),
    ]  # fmt: skip


def test_the_leader_looks_once_at_each_file_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path), Storage(), tmp_path)
    sizes = {f"rank-{rank:05d}.safetensors": rank for rank in range(5)}
    for step in (1, 2, 3):
        Path(store.at(step)).mkdir()
        for name, size in sizes.items():
            Path(store.at(step), name).write_bytes(bytes(size))
    looked_at: list[str] = []
    stat = os.stat

    def look(path: Any, **options: Any) -> os.stat_result:
        looked_at.append(str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", look)
    assert store.contents().published == dict.fromkeys((1, 2, 3), sizes)
    monkeypatch.undo()
    files = [path for path in looked_at if "rank-" in path]
    assert sorted(files) == [f"{store.at(step)}/{name}" for step in (1, 2, 3) for name in sizes]
    saves = FIGURES.saves
    looks = 3 * 1003 / FIGURES.limits.file_operations.value
    assert pruning_seconds(1000, 2, remote=False) == 1003 * saves.file_seconds.value + looks
    pages = (4 + 2) * saves.request_seconds.value
    assert pruning_seconds(1000, 2, remote=True) == pytest.approx(pages + 1003 * saves.request_processor_seconds.value)


def test_laws_of_a_start() -> None:
    checkpoint, records = (
        "the leader's look at the files of checkpoints",
        "the look at which shards are verified",
    )
    assert demand(RUN, 1024, checkpoint) == 3 * 1027
    assert demand(replace(RUN, remote=True), 4096, checkpoint) == 13
    assert demand(RUN, 4096, records) == 700_000 + 2 * 4096
    assert FIGURES.starts.store_connections.value == STORE_CONNECTIONS
    assert demand(RUN, 4096, "connections to the store of the ranks") == 8192
    index = "bytes of the index of the shards"
    assert demand(replace(RUN, remote=True), 512, index) == 8 * demand(RUN, 512, index)
    looks = "the leader's look at every shard"
    assert demand(RUN, 8, looks) == demand(RUN, 4096, looks) == 700_000 / FIGURES.limits.file_operations.value
    slow = FIGURES.saves.model_copy(
        update={"file_seconds": FIGURES.saves.file_seconds.model_copy(update={"value": 0.01})}
    )
    slower = replace(RUN, figures=FIGURES.model_copy(update={"saves": slow}))
    assert demand(slower, 8, looks) == pytest.approx(700_000 * 0.01 / CONCURRENT_LOOKS)
    assert demand(replace(RUN, remote=True), 8, looks) == pytest.approx(700 * FIGURES.saves.request_seconds.value)
    assert start_loads.fragments(RUN, 64) == 564
    assert start_loads.fragments(replace(RUN, zero_stage=3), 64) == 500 * 64
    assert start_loads.fragments(replace(RUN, zero_stage=0), 64) == 500


def test_laws_of_training() -> None:
    remote = replace(RUN, remote=True)
    shards = "bytes of shards"
    assert demand(remote, 512, shards) == 4096 / 0.5 * 1e5
    assert demand(remote, 4096, shards) == 8 * 4096 / (256 / 4096) * 1e5  # eight nodes share each lane
    assert demand(replace(remote, lanes=512), 4096, shards) == 4096 / (256 / 4096) * 1e5
    # 429 MB, in seven ranges of 64 MiB.
    each = demand(remote, 512, shards) / (RUN.samples * RUN.sample_bytes / RUN.shards)
    assert demand(remote, 512, "requests for shards") == pytest.approx(7 * each)
    whole = replace(remote, shards=3_000_000)
    assert demand(whole, 512, "requests for shards") == pytest.approx(demand(whole, 512, shards) / 1e8)
    assert demand(RUN, 64, "bytes of a save") == demand(RUN, 4096, "bytes of a save") == 24e9
    (published,) = (load for load in loads(remote, 4096) if load.name == "the leader's work for a save")
    seconds = publishing_seconds(4096, remote=True) + pruning_seconds(4096, 2, remote=True)
    assert published.share == pytest.approx(seconds / (1000 * 256 / 4096))
    assert 20 < seconds < 40
    verified = "bytes of shards that are verified behind the first start"
    assert verified not in {load.name for load in loads(replace(RUN, verify_shards=False), 8)}


def test_the_part_that_reaches_its_limit_first_comes_first() -> None:
    found = limits(RUN)
    reached = [limit.ranks for limit in found if limit.ranks]
    assert reached == sorted(reached)
    by_name = {limit.load.name: limit for limit in found}
    assert by_name["connections to the store of the ranks"].ranks is None
    few = FIGURES.limits.open_files.model_copy(update={"value": 4096})
    low = FIGURES.model_copy(update={"limits": FIGURES.limits.model_copy(update={"open_files": few})})
    by_name |= {limit.load.name: limit for limit in limits(replace(RUN, figures=low))}
    store = by_name["connections to the store of the ranks"]
    assert (store.ranks, store.load.share) == (2048, 1.0)
    assert by_name["bytes of a save"].ranks is None
    assert by_name["bytes of a save"].load.share < 1
    assert {limit.load.name for limit in found} == {load.name for load in loads(RUN, 4096)}


def test_every_load_says_what_it_rests_on_and_what_the_program_does() -> None:
    for run in (RUN, replace(RUN, remote=True)):
        for load in loads(run, 512):
            assert load.basis in Basis
            assert len(load.origin) > 20, load.name
            assert len(load.design) > 20, load.name
            assert load.share > 0
            assert "law" in load.origin, load.name
