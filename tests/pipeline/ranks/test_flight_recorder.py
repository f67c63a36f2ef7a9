"""What NCCL was exchanging when a run hung. There is no NCCL here: the backend's name and its record are faked."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from pipeline.faults.watchdog import Watchdog
from pipeline.ranks import flight_recorder
from pipeline.ranks.flight_recorder import save_flight_record
from pipeline.recipe.sections import WatchdogSettings


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bytes]], None]:
    """Makes this process one whose NCCL gives its record by the argument."""

    def record(dump: Callable[[], bytes]) -> None:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", dump, raising=False)

    return record


def test_the_record_is_saved_under_the_name_that_its_reader_expects(
    tmp_path: Path, recording: Callable[[Callable[[], bytes]], None]
) -> None:
    recording(lambda: b"collectives")
    assert save_flight_record(tmp_path, 3) == tmp_path / "nccl_trace_rank_3"
    assert (tmp_path / "nccl_trace_rank_3").read_bytes() == b"collectives"


def test_there_is_no_record_without_nccl(tmp_path: Path) -> None:
    assert save_flight_record(tmp_path, 0) is None


def test_a_record_that_cannot_be_had_delays_the_report_of_a_hang_for_seconds_at_most(
    tmp_path: Path, recording: Callable[[Callable[[], bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight_recorder, "_SECONDS", 0.1)

    def stuck() -> NoReturn:
        while True:
            time.sleep(60)

    def broken() -> NoReturn:
        raise RuntimeError("no recorder")

    for dump in (stuck, broken):
        recording(dump)
        assert save_flight_record(tmp_path, 0) is None


@pytest.mark.slow
def test_the_report_of_a_hang_names_the_record(
    tmp_path: Path, recording: Callable[[Callable[[], bytes]], None]
) -> None:
    recording(lambda: b"collectives")
    said: list[str] = []
    settings = WatchdogSettings(setup_seconds=0.1, least_seconds=0.1)
    with Watchdog(settings, 0, 1, "n1", tmp_path / "rank-0.log", lambda code, message: said.append(message)):  # type: ignore[arg-type, return-value]
        while not said:
            time.sleep(0.01)
    assert (
        f"in {tmp_path}, and what NCCL was exchanging in its nccl_trace_rank_* (torchfrtrace reads them); if" in said[0]
    )
    assert (tmp_path / "nccl_trace_rank_0").read_bytes() == b"collectives"
