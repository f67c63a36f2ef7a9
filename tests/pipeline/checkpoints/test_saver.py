"""Saving in the background: what training waits for, and what is written."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as library_bytes

from pipeline.checkpoints.host_copy import HostFile
from pipeline.checkpoints.manifest import FragmentEntry, Manifest, RankRecord
from pipeline.checkpoints.staged import StagedCheckpoint
from pipeline.errors import ConfigError
from pipeline.ranks.distributed import Ranks
from pipeline.zero.fragments import Fragment
from tests.pipeline.checkpoints.small import ALONE, Gate, holds, live, local, names, opened, save, saver, together
from tests.support.recipes import checkpoint_bytes, events
from tests.support.records import checkpoint_facts


def test_files_are_byte_for_byte_those_of_the_library() -> None:
    tensors = {
        "master.ü": torch.randn(5), "exp_avg.a": torch.randn(3, 2), "count": torch.tensor(7),
        "half": torch.randn(3).bfloat16(), "flags": torch.tensor([True, False, True]),
    }  # fmt: skip
    file = HostFile(tensors, pinned=False)
    file.fill(tensors)
    assert b"".join(file.blocks) == library_bytes(tensors)
    assert b"".join(HostFile({}, pinned=False).blocks) == library_bytes({})


def test_a_published_checkpoint_holds_nothing_but_what_its_manifest_names(tmp_path: Path) -> None:
    save(tmp_path, 3, count=3)
    path = tmp_path / "checkpoints/step-00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(names(path)) == {*manifest["files"], "manifest.json"}
    assert names(tmp_path / "checkpoints") == ["step-00000003"]


def test_a_checkpoint_is_a_function_of_the_state(tmp_path: Path) -> None:
    save(tmp_path / "one", 3, 5, count=2)
    save(tmp_path / "other", 5, count=2)
    one, other = (checkpoint_bytes(tmp_path / name / "checkpoints/step-00000005") for name in ("one", "other"))
    assert one == other


def test_training_goes_on_and_changes_the_state_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with saver(tmp_path) as one:
        state = live(3)
        one.save(state)  # returns although the write does not
        assert gate.reached.wait(60)
        for fragment in state.fragments:
            for tensor in fragment.tensors.values():
                tensor.zero_()
        assert one.reports() == []
        gate.open.set()
        assert one.finish()
        assert holds(opened(tmp_path, 3), 3)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is reused, and at most one save is in flight."""
    gate = Gate(monkeypatch)
    with saver(tmp_path) as one:
        one.save(live(3))
        assert gate.reached.wait(60)
        second = threading.Thread(target=lambda: one.save(live(6)))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        gate.open.set()
        second.join(60)
        assert one.finish()
    assert holds(opened(tmp_path, 3), 3)
    assert holds(opened(tmp_path, 6), 6)


def test_reports_and_event_log_have_stall_seconds_and_bytes(tmp_path: Path) -> None:
    with saver(tmp_path) as one:
        stalls = [one.save(live(step)) for step in (3, 6)]
        assert one.save(live(6)) == 0.0  # a second call for the same step
        assert one.finish()
        reports = one.reports()
        assert one.reports() == []
    folder = tmp_path / "checkpoints"
    for report, step, stall in zip(reports, (3, 6), stalls, strict=True):
        size = sum(len(data) for name, data in checkpoint_bytes(folder / report.checkpoint).items() if name[0] != "m")
        assert (report.step, report.bytes, report.failure) == (step, size, None)
        assert 0 < report.stall == stall < report.seconds
    saves = [entry for entry in events(tmp_path) if entry["event"] == "save"]
    assert [(e["step"], e["checkpoint"], e["bytes"]) for e in saves] == [
        (r.step, r.checkpoint, r.bytes) for r in reports
    ]


def test_without_a_save_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    with saver(tmp_path) as one:
        assert one.finish()
        one.finish_or_retry()
    assert names(tmp_path / "checkpoints") == []


def test_memory_is_allocated_once(tmp_path: Path) -> None:
    with saver(tmp_path) as one:
        one.save(live(3))
        addresses = {name: file.memory.data_ptr() for name, file in one._copy.files.items()}
        one.save(live(6))
        assert {name: file.memory.data_ptr() for name, file in one._copy.files.items()} == addresses


def test_state_with_missing_elements_is_never_published(tmp_path: Path) -> None:
    with saver(tmp_path) as one:
        state = live(1)
        cut = Fragment("b", 0, 49, {kind: t[:49] for kind, t in state.fragments[1].tensors.items()}, True)
        one.save(type(state)(state.facts, [state.fragments[0], cut, state.fragments[2]], state.buffers, state.shapes))
        assert not one.finish()
        assert [report.failure for report in one.reports()] == ["b: elements from 49 are missing"]
    assert names(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 5), (5, 9)], "b: elements from 9 are missing"),
        ([(0, 5), (6, 10)], "b: elements 5 to 6 are missing or written twice"),
        ([(0, 6), (5, 10)], "b: elements 6 to 5 are missing or written twice"),
        ([(5, 10)], "b: elements 0 to 5 are missing or written twice"),
        ([], "b: elements from 0 are missing"),
    ],
)
def test_fragments_must_be_every_element_once(ranges: list[tuple[int, int]], message: str) -> None:
    record = RankRecord({}, tuple(FragmentEntry("b", start, stop, "x") for start, stop in ranges))
    with pytest.raises(ValueError, match=message):
        Manifest.of(checkpoint_facts(1), {"b": (2, 5)}, [record])


def test_leftovers_of_a_killed_save_are_swept_away_and_never_mixed_into_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / "checkpoints/.step-00000009.00000000abcd.writing"
    leftover.mkdir(parents=True)
    (leftover / "rank-00001.safetensors").write_bytes(b"old")
    (leftover / "rank-00001.00000000abcd.json").write_text('{"files": {}, "fragments": []}')
    save(tmp_path, 9, count=2)
    assert names(tmp_path / "checkpoints") == ["step-00000009"]
    assert holds(opened(tmp_path, 9), 9)


def test_a_record_of_another_attempt_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of this very attempt, as a server that wakes up late might leave it."""
    gate = Gate(monkeypatch, "rank-00001.safetensors")

    def work(ranks: Ranks) -> bool:
        with saver(tmp_path, ranks) as one:
            one.save(live(9, ranks))
            if ranks.is_leader:
                assert gate.reached.wait(60)
                (folder,) = (tmp_path / "checkpoints").glob(".step-*")
                (folder / "rank-00001.00000000abcd.json").write_text('{"files": {}, "fragments": []}')
                assert one._attempt is not None
                assert one._attempt._written.wait(60)
                one._attempt._thread.join(0.2)
                assert one._attempt.alive
                gate.open.set()
            return one.finish()

    assert together(2, work) == [True, True]
    assert holds(opened(tmp_path, 9), 9)
    assert len(names(tmp_path / "checkpoints/step-00000009")) == 4


def test_a_file_that_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def spoiled(descriptor: int) -> None:
        """A disk that changes a byte, which a test cannot have."""
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(os, "fsync", spoiled)
    with saver(tmp_path) as one:
        one.save(live(1))
        assert not one.finish()
        assert "the data read back differs from what was written" in str(one.reports()[0].failure)
    assert names(tmp_path / "checkpoints") == []


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = type(local(tmp_path))(str(tmp_path / "file/below"), local(tmp_path).storage, tmp_path / "run/checkpoints")
    with pytest.raises(ConfigError, match="checkpoint.folder: .*file/below cannot be written"):
        saver(tmp_path / "run", ALONE, store)


def test_a_record_counts_as_progress_once_its_files_are_there(tmp_path: Path) -> None:
    """Otherwise a save that waits for a file in vain would never be given up."""
    progress: list[None] = []
    leader, other = (StagedCheckpoint(local(tmp_path), 3, 1, rank, lambda: progress.append(None)) for rank in (0, 1))
    entry = other.write("rank-00001.safetensors", [memoryview(b"state")])
    other.write_record(RankRecord({"rank-00001.safetensors": entry}, ()))
    (path,) = tmp_path.glob("checkpoints/.step-00000003.*/rank-00001.safetensors")
    for content, records in ((b"sta", 0), (b"state", 1)):
        path.write_bytes(content)
        progress.clear()
        assert len(leader.records({1})) == len(progress) == records
    path.unlink()
    assert leader.records({1}) == {}
