"""Event files as TensorBoard reads them: over several starts, and over a disk that was full for a while."""

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
    """No file of this process may grow beyond `bytes_left`: a real OSError at a real write, for root too."""
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


def test_the_points_of_a_start_come_back(tmp_path: Path) -> None:
    write_start(tmp_path, 0, 5)
    assert points(tmp_path) == {"loss": [(step, step) for step in range(1, 6)]}


def test_a_later_start_drops_what_lies_beyond_its_first_step(tmp_path: Path) -> None:
    write_start(tmp_path, 0, 8)
    write_start(tmp_path, 5, 7)
    write_start(tmp_path, 6, 7)
    assert steps(tmp_path) == {"loss": [1, 2, 3, 4, 5, 6, 7]}


def test_a_later_start_comes_last_even_by_a_clock_that_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_start(tmp_path, 0, 8)
    now = time.time()
    monkeypatch.setattr("pipeline.monitoring.event_file.time.time", lambda: now - 3600)
    write_start(tmp_path, 5, 7)
    assert steps(tmp_path) == {"loss": [1, 2, 3, 4, 5, 6, 7]}


def test_a_record_that_a_kill_cut_short_hides_no_later_start(tmp_path: Path) -> None:
    write_start(tmp_path, 0, 8)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    write_start(tmp_path, 8, 10)
    assert steps(tmp_path) == {"loss": [1, 2, 3, 4, 5, 6, 7, 9, 10]}


def test_going_back_within_a_start_drops_what_lies_beyond(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 1, never)
    for step in (1, 2, 3):
        file.add(scalars({"loss": 0.0}), step)
    file.purge(2)
    file.add(scalars({"loss": 1.0}), 2)
    file.close()
    assert points(tmp_path) == {"loss": [(1, 0.0), (2, 1.0)]}


def test_a_full_disk_is_told_once_and_nothing_is_lost_when_there_is_room_again(tmp_path: Path) -> None:
    said: list[str] = []
    file = EventFile(tmp_path, 1, said.append)
    file.flush()
    for step in range(1, 41):
        file.add(scalars({"loss": float(step)}), step)
        if step < 11 or step > 30:
            file.flush()
        else:
            # Leaves room for a part of a record, so that one is cut in the middle.
            with full_disk(500):
                file.flush()
    file.close()
    assert points(tmp_path) == {"loss": [(step, step) for step in range(1, 41)]}
    assert [" cannot be written (File too large)" in said[0], " is written again" in said[1]] == [True, True]
    assert len(said) == 2


def test_a_disk_that_stays_full_takes_no_endless_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.monitoring.event_file._MOST_PENDING", 1000)
    said: list[str] = []
    file = EventFile(tmp_path, 1, said.append)
    with full_disk(0):
        for step in range(1, 101):
            file.add(scalars({"loss": 0.0}), step)
            file.flush()
    file.close()
    written = steps(tmp_path)["loss"]
    assert written == list(range(1, len(written) + 1))
    assert 0 < len(written) < 100
    assert f"; {100 - len(written)} entries are lost" in said[1]


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    file = EventFile(tmp_path / "file", 1, said.append)
    file.add(scalars({"loss": 0.0}), 1)
    file.close()
    assert "Not a directory" in said[0]
