"""Saves that fail, hang or are interrupted: what is tried again, what is kept and what is said."""

import errno
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import StorageDown
from data.files.atomic_file import sync_folder, write_atomically
from pipeline.checkpoints import staged
from pipeline.checkpoints.manifest import FileEntry, RankRecord
from pipeline.checkpoints.save_task import SaveTask
from pipeline.errors import RunFailed
from pipeline.ranks.distributed import Ranks
from tests.pipeline.checkpoints.small import Gate, holds, live, local, names, opened, save, saver, together
from tests.support.recipes import checkpoint_bytes, events


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_any_rank_is_recorded_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder = tmp_path / "checkpoints"
    real, failures = staged._write_verified, [f"rank-{failing:05d}.safetensors"]

    def failed(path: Path, *arguments: Any) -> FileEntry:
        """A disk that refuses once; a full one is in test_disk_full.py."""
        if path.name in failures:
            failures.remove(path.name)
            raise OSError(5, "Input/output error")
        return real(path, *arguments)

    save(tmp_path, 1, count=2)
    monkeypatch.setattr(staged, "_write_verified", failed)

    def work(ranks: Ranks) -> list[bool]:
        with saver(tmp_path, ranks) as one:
            published = []
            for step in (2, 3):
                one.save(live(step, ranks))
                published.append(one.finish())
            return published

    assert together(2, work) == [[False, True], [False, True]]
    failed_save = next(entry for entry in events(tmp_path) if entry["event"] == "save_failed")
    assert failed_save["step"] == 2
    assert failed_save["reason"] == ("" if failing == 0 else "rank 1: ") + "[Errno 5] Input/output error"
    assert names(folder) == ["step-00000001", "step-00000003"]


def test_a_rank_that_can_write_nothing_at_all_delays_the_others_only_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a record of its failure: what ranks exchange at the next save is enough."""
    real_write, real_record = staged._write_verified, staged.StagedCheckpoint.write_record

    def failed(path: Path, *arguments: Any) -> FileEntry:
        """A mount that is gone on rank 1."""
        if path.name.startswith("rank-00001") and "00000002" in str(path):
            raise OSError(116, "Stale file handle")
        return real_write(path, *arguments)

    def record_failed(self: staged.StagedCheckpoint, record: RankRecord) -> None:
        if record.failed is not None:
            raise OSError(116, "Stale file handle")
        real_record(self, record)

    monkeypatch.setattr(staged, "_write_verified", failed)
    monkeypatch.setattr(staged.StagedCheckpoint, "write_record", record_failed)

    def work(ranks: Ranks) -> bool:
        with saver(tmp_path, ranks) as one:
            one.save(live(2, ranks))
            one.save(live(4, ranks))
            return one.finish()

    assert together(2, work) == [True, True]
    failed_save = next(entry for entry in events(tmp_path) if entry["event"] == "save_failed")
    assert failed_save["reason"] == "no record from rank 1; its log may show why"
    assert names(tmp_path / "checkpoints") == ["step-00000004"]


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_write_that_hangs_is_abandoned_and_saves_work_again_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: int
) -> None:
    gate = Gate(monkeypatch, f"rank-{hanging:05d}.safetensors")

    def work(ranks: Ranks) -> list[bool]:
        with saver(tmp_path, ranks, patience=0.5) as one:
            one.save(live(2, ranks))
            one.save(live(4, ranks))  # abandoned, since the thread is still busy with the old one
            published = [one.finish()]
            one._patience = 60  # what follows may be slow
            gate.open.set()
            assert one._attempt is not None
            one._attempt._thread.join(60)
            ranks.barrier()
            one.save(live(6, ranks))
            return [*published, one.finish()]

    assert together(2, work) == [[False, True], [False, True]]
    failed_saves = [entry for entry in events(tmp_path) if entry["event"] == "save_failed"]
    assert failed_saves[-1]["reason"] == "a rank still hangs in an earlier save"
    assert holds(opened(tmp_path, 6), 6)


def test_an_earlier_save_that_ends_late_is_not_mistaken_for_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with saver(tmp_path, patience=0.3) as one:
        one.save(live(2))
        one.save(live(4))
        one._patience = 60  # what follows may be slow
        gate.open.set()
        assert one._attempt is not None
        one._attempt._thread.join(60)
        assert names(tmp_path / "checkpoints") == ["step-00000002"]
        assert not one.finish()
        one.finish_or_retry(pause=0)
        assert holds(opened(tmp_path, 4), 4)


def test_a_rank_may_be_slower_than_the_others_by_more_than_the_patience_while_it_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, exchanges = Gate(monkeypatch, "rank-00001.safetensors"), [20]

    def work(ranks: Ranks) -> list[bool]:
        @contextmanager
        def section() -> Iterator[None]:
            """Between two exchanges of the ranks that wait, the slow one writes something."""
            assert one._attempt is not None
            if not ranks.is_leader:
                one._attempt.note_progress()
                exchanges[0] -= 1
                if exchanges[0] == 0:
                    gate.open.set()
            yield

        with saver(tmp_path, ranks, patience=0.2, section=section) as one:
            one.save(live(2, ranks))
            first = one.finish()
            one._patience = 60  # what follows may be slow
            one.save(live(4, ranks))
            return [first, one.finish()]

    assert together(2, work) == [[True, True], [True, True]]
    assert exchanges[0] <= 0
    assert not [entry for entry in events(tmp_path) if entry["event"] == "save_failed"]


def test_an_attempt_that_was_given_up_and_is_published_late_is_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with saver(tmp_path, patience=0.3) as one:
        one.save(live(2))
        assert not one.finish()
        attempt = one._attempt
        assert attempt is not None
        one._patience = 60  # what follows may be slow
        gate.open.set()
        attempt._thread.join(60)
        one.save(live(2))
        assert one._attempt is attempt
        assert one.finish()
        one.save(live(4))
        assert one.finish()
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000004"]


def test_a_retry_accepts_what_an_attempt_with_an_error_has_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(5, "Input/output error")]

    def failed(path: Path) -> None:
        sync_folder(path)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(staged, "sync_folder", failed)

    def work(ranks: Ranks) -> None:
        with saver(tmp_path, ranks) as one:
            one.save(live(9, ranks))
            one.finish_or_retry(attempts=2, pause=0)

    together(2, work)
    assert names(tmp_path / "checkpoints") == ["step-00000009"]
    assert holds(opened(tmp_path, 9), 9)


def test_another_checkpoint_of_the_same_step_is_neither_accepted_nor_touched(tmp_path: Path) -> None:
    save(tmp_path, 9)
    foreign = live(9)
    run = replace(foreign.facts.run, run_id=uuid.uuid4().hex)
    before = checkpoint_bytes(tmp_path / "checkpoints/step-00000009")
    with saver(tmp_path) as one:
        one.save(replace(foreign, facts=replace(foreign.facts, run=run)))
        assert not one.finish()
        assert "Directory not empty" in str(one.reports()[0].failure)
    assert checkpoint_bytes(tmp_path / "checkpoints/step-00000009") == before


def test_after_an_error_of_the_run_the_save_in_flight_ends_and_after_an_interruption_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, error: BaseException) -> None:
        with saver(folder) as one:
            one.save(live(3))
            attempts.append(one._attempt)
            assert gate.reached.wait(60)
            opening.start()
            raise error

    attempts: list[SaveTask | None] = []
    for error, published in ((ValueError(), True), (KeyboardInterrupt(), False)):
        gate = Gate(monkeypatch)
        folder = tmp_path / type(error).__name__
        opening = threading.Timer(0.3, gate.open.set)
        with pytest.raises(type(error)):
            run(folder, error)
        assert (folder / "checkpoints/step-00000003").exists() == published
        opening.join()
        assert attempts[-1] is not None
        attempts[-1]._thread.join(60)
        monkeypatch.undo()


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_a_rank_that_fails_leaves_only_after_the_save_in_flight_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...]
) -> None:
    """Its process ends next, and takes the other ranks with it, who wait for it in a collective."""
    slow = 1 - failing[0]
    gate, left = Gate(monkeypatch, f"rank-{slow:05d}.safetensors"), threading.Barrier(2, timeout=60)
    published = []

    def work(ranks: Ranks) -> None:
        with suppress(ValueError), saver(tmp_path, ranks) as one:
            one.save(live(3, ranks))
            if ranks.rank == 0:
                assert gate.reached.wait(60)
                threading.Timer(0.3, gate.open.set).start()
            if ranks.rank not in failing:
                left.wait()
            raise ValueError
        if ranks.rank in failing:
            published.append((tmp_path / "checkpoints/step-00000003/manifest.json").exists())
            if len(failing) == 1:
                left.wait()

    together(2, work)
    assert published == [True] * len(failing)
    assert holds(opened(tmp_path, 3), 3)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_in_flight_that_does_not_end_is_not_waited_for_without_limit_and_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch, f"rank-{1 - failing:05d}.safetensors")
    attempts: dict[int, SaveTask | None] = {}
    left = threading.Barrier(2, timeout=60)

    def work(ranks: Ranks) -> None:
        with suppress(ValueError), saver(tmp_path, ranks, error_patience=0.2) as one:
            one.save(live(3, ranks))
            attempts[ranks.rank] = one._attempt
            if ranks.rank != failing:
                left.wait()
            raise ValueError
        if ranks.rank == failing:
            left.wait()

    together(2, work)
    assert "the checkpoint of step 3 was not complete in time and is lost" in caplog.text
    assert not (tmp_path / "checkpoints/step-00000003").exists()
    gate.open.set()
    for attempt in attempts.values():
        assert attempt is not None
        attempt.wait(60)


def test_the_last_checkpoint_is_retried_and_then_its_failure_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = staged._write_verified, [2]

    def failed(path: Path, *arguments: Any) -> FileEntry:
        """A disk that refuses a number of times."""
        if path.name == "rank-00001.safetensors" and left[0] > 0:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return real(path, *arguments)

    monkeypatch.setattr(staged, "_write_verified", failed)

    def work(ranks: Ranks) -> None:
        with saver(tmp_path, ranks) as one:
            one.save(live(9, ranks))
            one.finish_or_retry(attempts=3, pause=0.01)

    together(2, work)
    assert holds(opened(tmp_path, 9), 9)
    local(tmp_path).remove(9)
    left[0] = 100
    with pytest.raises(
        RunFailed, match=r"checkpoints: the last checkpoint could not be saved in 3 attempts \(rank 1: .*No space"
    ):
        together(2, work)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_last_checkpoint_that_fails_for_a_reason_that_may_pass_is_worth_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real = staged._write_verified

    def failed(path: Path, *arguments: Any) -> FileEntry:
        """A server that is away."""
        if path.name == f"rank-0000{failing}.safetensors" and "00000009" in str(path):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *arguments)

    monkeypatch.setattr(staged, "_write_verified", failed)

    def work(ranks: Ranks) -> tuple[str, str | None]:
        with saver(tmp_path, ranks) as one:
            one.save(live(8, ranks))
            assert one.finish()
            one.save(live(9, ranks))
            with pytest.raises(StorageDown) as caught:
                one.finish_or_retry(attempts=2, pause=0)
        return str(caught.value), caught.value.if_repeated

    message, other = together(2, work)
    assert message == other
    assert "could not be saved in 2 attempts (" in message[0]
    assert "Stale file handle" in message[0]
    assert message[1] == "the same command continues from step-00000008"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ESTALE])
def test_a_manifest_that_cannot_be_written_costs_the_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    errors = [OSError(code, os.strerror(code))]

    def failed(path: Path, data: bytes) -> None:
        if path.name == "manifest.json" and errors:
            raise errors.pop()
        write_atomically(path, data)

    monkeypatch.setattr(staged, "write_atomically", failed)
    with saver(tmp_path) as one:
        one.save(live(2))
        assert not one.finish()
        assert os.strerror(code) in str(one.reports()[0].failure)
        assert names(tmp_path / "checkpoints") == []
        one.save(live(4))
        assert one.finish()
    assert names(tmp_path / "checkpoints") == ["step-00000004"]
