"""Checkpoints in an object store: a real S3 server, and one whose connections break."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import StorageDown, StorageRefused
from data.remote.storage import Storage, file_size, read_bytes, remove, upload, write_bytes
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.resume import newest_intact, open_verified
from pipeline.checkpoints.staged import StagedCheckpoint
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError
from pipeline.ranks.distributed import Ranks
from tests.pipeline.checkpoints.small import ALONE, holds, live, names, save, saver, together
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server
from tests.support.recipes import events

pytestmark = pytest.mark.slow

STEP_3 = "step-00000003"


@pytest.fixture
def store(s3: S3Server, tmp_path: Path) -> CheckpointStore:
    """A store that no other test uses."""
    return CheckpointStore(f"s3://test/{uuid.uuid4().hex}", Storage(greatest_delay=0.2), tmp_path / "run/checkpoints")


def remote_names(s3: S3Server, store: CheckpointStore, step: str = "") -> list[str]:
    location = f"{store.location}/{step}".removeprefix("s3://").rstrip("/")
    # This server goes on to list the emptied folder itself.
    return sorted(path[len(location) + 1 :] for path in s3.files().find(location) if len(path) > len(location))


def spoil(s3: S3Server, store: CheckpointStore, file: str, damage: str) -> None:
    path = f"{store.location}/{STEP_3}/{file}".removeprefix("s3://")
    data = bytearray(s3.files().cat_file(path))
    if damage == "missing":
        s3.files().rm_file(path)
        return
    data[-20] ^= 1
    s3.files().pipe_file(path, bytes(data[:-1] if damage == "cut" else data))


def test_what_was_saved_is_read_back_and_nothing_stays_on_this_machine(
    s3: S3Server, store: CheckpointStore, tmp_path: Path
) -> None:
    save(tmp_path / "run", 3, count=2, store=store)
    assert remote_names(s3, store) == [
        f"{STEP_3}/{name}"
        for name in ("buffers.safetensors", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")
    ]
    assert names(store.scratch) == []

    def work(ranks: Ranks) -> list[str]:
        checkpoint, skipped = newest_intact([store], ranks)
        assert checkpoint is not None
        assert skipped == []
        # So far each rank has downloaded what it hashed, which is what it saved.
        mine = names(store.scratch / f".downloads/rank-0000{ranks.rank}")
        assert holds(checkpoint, 3)
        assert checkpoint.buffers()["batches"].item() == 3
        checkpoint.close()
        return mine

    assert together(2, work) == [["buffers.safetensors", "rank-00000.safetensors"], ["rank-00001.safetensors"]]
    assert names(store.scratch / ".downloads") == []
    with_no_folder_given = open_checkpoint(f"{store.location}/{STEP_3}")
    assert holds(with_no_folder_given, 3)


def test_old_checkpoints_and_leftovers_of_a_killed_save_are_removed(
    s3: S3Server, store: CheckpointStore, tmp_path: Path
) -> None:
    files = s3.files()
    root = store.location.removeprefix("s3://")
    files.pipe_file(f"{root}/step-00000002/rank-00000.safetensors", b"left")
    files.pipe_file(f"{root}/step-00000004/rank-00007.safetensors", b"left")
    staged = store.scratch / ".step-00000002.0000000000ab.writing"
    staged.mkdir(parents=True)
    save(tmp_path / "run", 1, 3, 4, store=store, keep_last=2)
    assert {name.partition("/")[0] for name in remote_names(s3, store)} == {STEP_3, "step-00000004"}
    assert "rank-00007.safetensors" not in remote_names(s3, store, "step-00000004")
    assert names(store.scratch) == []


def test_a_checkpoint_without_manifest_does_not_exist(s3: S3Server, store: CheckpointStore, tmp_path: Path) -> None:
    save(tmp_path / "run", 1, 3, store=store)
    spoil(s3, store, "manifest.json", "missing")
    checkpoint, skipped = newest_intact([store], ALONE)
    assert checkpoint is not None
    assert (checkpoint.step, skipped) == (1, [])


@pytest.mark.parametrize(
    ("file", "damage"),
    [("rank-00001.safetensors", "flipped"), ("buffers.safetensors", "missing"), ("rank-00000.safetensors", "cut"),
     ("manifest.json", "flipped")],
)  # fmt: skip
def test_damaged_checkpoints_are_passed_over_and_set_aside(
    s3: S3Server, store: CheckpointStore, tmp_path: Path, file: str, damage: str
) -> None:
    save(tmp_path / "run", 1, 3, count=2, store=store)
    spoil(s3, store, file, damage)

    def work(ranks: Ranks) -> list[str]:
        checkpoint, skipped = newest_intact([store], ranks)
        assert checkpoint is not None
        assert holds(checkpoint, 1)
        return skipped

    (reason,), others = together(2, work)
    assert others == [reason]
    assert f"{STEP_3}: damaged: " in reason
    assert file in reason
    assert "damaged-manifest.json" in remote_names(s3, store, STEP_3)
    assert store.contents().steps == [1]
    save(tmp_path / "run", 3, count=2, store=store)  # the run reaches this step again
    checkpoint = open_verified(store.at(3), ALONE, store.storage)
    assert holds(checkpoint, 3)
    assert len(remote_names(s3, store, STEP_3)) == 4


def test_connections_cut_during_uploads_only_cost_time(s3: S3Server, store: CheckpointStore, tmp_path: Path) -> None:
    with FaultProxy(s3.port) as proxy:
        faults = [
            Fault("cut", path="rank-00001.safetensors", method="PUT", times=2, after=5000),
            Fault("status", path="buffers.safetensors", method="PUT", times=1),
            Fault("status", path="manifest.json", method="PUT", times=1, status=500, code="InternalError"),
            Fault("reset", path="rank-00000.safetensors", method="GET", times=1, after=5000),
        ]
        proxy.faults += faults
        save(tmp_path / "run", 3, count=2, store=replace(store, storage=replace(store.storage, endpoint=proxy.url)))
        assert [fault.fired for fault in faults] == [2, 1, 1, 1]
    assert holds(open_verified(store.at(3), ALONE, store.storage), 3)


def test_an_upload_that_always_fails_is_recorded_and_the_next_save_works(
    s3: S3Server, store: CheckpointStore, tmp_path: Path
) -> None:
    with FaultProxy(s3.port) as proxy:
        storage = replace(store.storage, endpoint=proxy.url, give_up_after=0.5)
        proxy.faults.append(Fault("cut", path=f"{STEP_3}/rank-00001.safetensors", method="PUT", after=100))

        def work(ranks: Ranks) -> list[bool]:
            with saver(tmp_path / "run", ranks, replace(store, storage=storage)) as one:
                published = []
                for step in (1, 3, 5):
                    one.save(live(step, ranks))
                    published.append(one.finish())
                return published

        assert together(2, work) == [[True, False, True], [True, False, True]]
    (failed_save,) = [entry for entry in events(tmp_path / "run") if entry["event"] == "save_failed"]
    assert failed_save["step"] == 3
    assert "rank 1: " in failed_save["reason"]
    assert "no answer in 0 s" in failed_save["reason"]
    assert store.contents().steps == [5, 1]
    assert remote_names(s3, store, STEP_3) == []
    assert names(store.scratch) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_retry_that_fails_leaves_what_an_earlier_attempt_has_published(
    s3: S3Server, store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, failures = upload, 0

    def lost(*arguments: Any) -> None:
        """The manifest arrives, and neither the answer nor that to the next question."""
        write_bytes(*arguments)
        if str(arguments[0]).endswith("manifest.json"):
            raise StorageDown("no answer")

    def failed(path: Path, *arguments: Any) -> None:
        nonlocal failures
        real(path, *arguments)
        if path.name == f"rank-0000{failing}.safetensors":
            failures += 1
            if failures > 1:
                raise StorageDown("no answer")

    monkeypatch.setattr("pipeline.checkpoints.staged.write_bytes", lost)
    monkeypatch.setattr("pipeline.checkpoints.staged.upload", failed)
    monkeypatch.setattr("pipeline.checkpoints.staged.StagedCheckpoint._is_published", lambda self, manifest: False)

    def work(ranks: Ranks) -> list[bool]:
        with saver(tmp_path / "run", ranks, store) as one:
            published = []
            for _ in range(2):
                one.save(live(3, ranks))
                published.append(one.finish())
            return published

    assert together(2, work) == [[False, False], [False, False]]
    assert holds(open_verified(store.at(3), ALONE, store.storage), 3)


def test_a_manifest_that_arrives_without_an_answer_is_published(
    s3: S3Server, store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: Any) -> None:
        write_bytes(*arguments)
        raise StorageDown("no answer")

    monkeypatch.setattr("pipeline.checkpoints.staged.write_bytes", lost)
    save(tmp_path / "run", 3, store=store)
    assert store.contents().steps == [3]


@pytest.mark.parametrize("when", ["before the manifest", "after the manifest"])
def test_a_record_that_is_sent_again_after_the_leader_has_read_it_does_not_stay(
    when: str, s3: S3Server, store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the first request was lost; the second one is as slow as it takes."""
    first_arrived, leader_has_come_so_far, arrived_again = (threading.Event() for _ in range(3))
    make_visible = StagedCheckpoint._make_visible

    def visible(self: StagedCheckpoint, manifest: bytes) -> None:
        if when == "before the manifest":
            leader_has_come_so_far.set()
            assert arrived_again.wait(60)
        make_visible(self, manifest)

    def repeated(location: str, data: bytes, storage: Storage) -> None:
        write_bytes(location, data, storage)
        if "rank-00001" in location:
            first_arrived.set()
            assert leader_has_come_so_far.wait(60)
            write_bytes(location, data, storage)
            arrived_again.set()

    monkeypatch.setattr(StagedCheckpoint, "_make_visible", visible)
    monkeypatch.setattr("pipeline.checkpoints.staged.write_bytes", repeated)

    def work(ranks: Ranks) -> None:
        with saver(tmp_path / "run", ranks, store) as one:
            one.save(live(3, ranks))
            if ranks.is_leader and when == "after the manifest":
                assert first_arrived.wait(60)
                while 3 not in store.contents().steps:
                    time.sleep(0.02)
                leader_has_come_so_far.set()
            assert one.finish()

    together(2, work)
    assert remote_names(s3, store) == [
        f"{STEP_3}/{name}"
        for name in ("buffers.safetensors", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")
    ]


def test_an_upload_that_arrives_altered_is_not_published(
    s3: S3Server, store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(path: Path, *arguments: Any) -> None:
        """A byte changes on the way, which the server's own checks would not let through from here."""
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        upload(path, *arguments)

    monkeypatch.setattr("pipeline.checkpoints.staged.upload", spoiled)
    with saver(tmp_path / "run", ALONE, store) as one:
        one.save(live(3))
        assert not one.finish()
        assert "the data read back differs from what was written" in str(one.reports()[0].failure)
    assert remote_names(s3, store) == []


def test_a_store_that_refuses_access_is_reported_at_the_start(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "readonly")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "readonly")
    # A client of this test alone, since clients keep their credentials.
    store = CheckpointStore(f"s3://test/{uuid.uuid4().hex}", Storage(give_up_after=7), tmp_path / "run/checkpoints")
    with pytest.raises(StorageRefused, match="access refused"):
        saver(tmp_path / "run", ALONE, store)


def test_a_server_that_is_unreachable_at_the_start_is_not_an_empty_store(s3: S3Server, store: CheckpointStore) -> None:
    """The run would start over."""
    with FaultProxy(s3.port) as proxy:
        proxy.faults.append(Fault("status", path="", method="GET"))
        storage = replace(store.storage, endpoint=proxy.url, give_up_after=0.3)
        with pytest.raises(StorageDown):
            newest_intact([replace(store, storage=storage)], ALONE)


def test_a_checkpoint_that_does_not_exist_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(ConfigError, match="not a checkpoint"):
        open_checkpoint(store.at(3), store.storage)


def test_large_files_are_uploaded_in_parts_that_are_retried_one_by_one(s3: S3Server, tmp_path: Path) -> None:
    path, part = tmp_path / "large", 5 * 2**20
    path.write_bytes(os.urandom(3 * part + 17))
    location = f"s3://test/{uuid.uuid4().hex}/large"
    moved: list[int] = []
    with FaultProxy(s3.port) as proxy:
        fault = Fault("cut", path="partNumber=2", method="PUT", times=2, after=2**20)
        proxy.faults.append(fault)
        upload(path, location, Storage(endpoint=proxy.url, greatest_delay=0.1), moved.append, part)
        assert fault.fired == 2
        sent = [path for method, path in proxy.requests if method == "PUT"]
        assert len(sent) == 4 + 2
    assert sum(moved) == 3 * part + 17
    assert read_bytes(location, Storage()) == path.read_bytes()
    remove(location, Storage())
    remove(location, Storage())
    with pytest.raises(FileNotFoundError):
        file_size(location, Storage())


def test_a_failed_upload_in_parts_leaves_no_parts(s3: S3Server, tmp_path: Path) -> None:
    path, part = tmp_path / "large", 5 * 2**20
    path.write_bytes(os.urandom(2 * part))
    name = uuid.uuid4().hex
    with FaultProxy(s3.port) as proxy:
        proxy.faults.append(Fault("cut", path="partNumber=2", method="PUT", after=2**20))
        with pytest.raises(StorageDown):
            upload(path, f"s3://test/{name}/large", Storage(endpoint=proxy.url, give_up_after=0.3), part=part)
    left = s3.files().call_s3("list_multipart_uploads", Bucket="test", Prefix=name)
    assert not left.get("Uploads")


def test_a_file_system_is_not_shared_with_a_fork(s3: S3Server, store: CheckpointStore) -> None:
    """Its event loop stays behind, and requests would wait forever."""
    program = (
        "import os, sys; from data.remote.storage import Storage, file_size; where = sys.argv[1];"
        "file_size(where, Storage()); child = os.fork();"
        "os._exit(file_size(where, Storage()) != 3) if child == 0 else None;"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    s3.files().pipe_file(f"{store.location}/x".removeprefix("s3://"), b"abc")
    process = subprocess.Popen([sys.executable, "-c", program, f"{store.location}/x"], start_new_session=True)
    try:
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
