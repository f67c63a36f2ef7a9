"""Event files as TensorBoard reads them: over several starts, and after a disk that was full for a while."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.monitoring.charts import scalars
from pipeline.monitoring.event_file import EventFile
from tests.support.event_files import points, steps


def never(message: str) -> None:
    raise AssertionError(message)


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Let no file of this process grow beyond `bytes_left`: a real OSError at a real write, also for root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_start(folder: Path, first_step: int, last_step: int) -> None:
    file = EventFile(folder, first_step + 1, never)
    for step in range(first_step + 1, last_step + 1):
        file.add(scalars({"loss": float(step)}), step)
        file.flush()
    file.close()


def test_the_points_of_a_start_are_read_back(tmp_path: Path) -> None:
    write_start(tmp_path, 0, 5)
    assert points(tmp_path) == {"loss": [(step, step) for step in range(1, 6)]}


def test_a_later_start_drops_points_beyond_its_first_step(tmp_path: Path) -> None:
    write_start(tmp_path, 0, 8)
    write_start(tmp_path, 5, 7)
    write_start(tmp_path, 6, 7)
    assert steps(tmp_path) == {"loss": [1, 2, 3, 4, 5, 6, 7]}


def test_a_later_start_comes_last_even_if_its_clock_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_start(tmp_path, 0, 8)
    now = time.time()
    monkeypatch.setattr("pipeline.monitoring.event_file.time.time", lambda: now - 3600)
    write_start(tmp_path, 5, 7)
    assert steps(tmp_path) == {"loss": [1, 2, 3, 4, 5, 6, 7]}


def test_a_record_truncated_by_a_kill_hides_no_later_start(tmp_path: Path) -> None:
    write_start(tmp_path, 0, 8)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    write_start(tmp_path, 8, 10)
    assert steps(tmp_path) == {"loss": [1, 2, 3, 4, 5, 6, 7, 9, 10]}


def test_a_full_disk_is_reported_once_and_nothing_is_lost_once_there_is_room_again(tmp_path: Path) -> None:
    messages: list[str] = []
    file = EventFile(tmp_path, 1, messages.append)
    file.flush()
    for step in range(1, 41):
        file.add(scalars({"loss": float(step)}), step)
        if step < 11 or step > 30:
            file.flush()
        else:
            # Leaves room for part of a record, so that one is split.
            with full_disk(500):
                file.flush()
    file.close()
    assert points(tmp_path) == {"loss": [(step, step) for step in range(1, 41)]}
    assert [" cannot be written (File too large)" in messages[0], " is written again" in messages[1]] == [True, True]
    assert len(messages) == 2


def test_a_disk_that_stays_full_uses_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.monitoring.event_file._MOST_PENDING", 1000)
    messages: list[str] = []
    file = EventFile(tmp_path, 1, messages.append)
    with full_disk(0):
        for step in range(1, 101):
            file.add(scalars({"loss": 0.0}), step)
            file.flush()
    file.close()
    written = steps(tmp_path)["loss"]
    assert written == list(range(1, len(written) + 1))
    assert 0 < len(written) < 100
    assert f"; {100 - len(written)} entries are lost" in messages[1]


def test_a_folder_that_cannot_be_created_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    messages: list[str] = []
    file = EventFile(tmp_path / "file", 1, messages.append)
    file.add(scalars({"loss": 0.0}), 1)
    file.close()
    assert "Not a directory" in messages[0]
