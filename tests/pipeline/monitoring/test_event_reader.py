"""Event files read back: as TensorBoard shows them, and with what of a damaged one is missing."""

import os
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard.summary import image

from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from pipeline.monitoring.event_reader import read_events
from tests.support.event_files import points


def write(folder: Path, steps: range, purge: int = 1) -> Path:
    """The event file of a start; values are the steps."""
    before = set(folder.glob("*"))
    file = EventFile(folder, purge, pytest.fail)
    for step in steps:
        file.add(charts.scalars({"train/loss": float(step), "train/learning_rate": step / 1000}), step)
    file.add(image("train/images", np.full((90, 90, 3), steps.start, np.uint8), dataformats="HWC"), steps.start)  # type: ignore[no-untyped-call]
    file.close()
    (path,) = set(folder.glob("*")) - before
    return path


def test_what_is_read_is_what_tensorboard_shows_across_restarts(tmp_path: Path) -> None:
    write(tmp_path, range(1, 400))
    write(tmp_path, range(150, 260), purge=150)
    found = read_events(tmp_path)
    assert (found.files, found.problems) == (2, [])
    shown = points(tmp_path)
    assert found.scalars.keys() == {"train/loss", "train/learning_rate"}
    for tag, values in found.scalars.items():
        assert [(point.step, point.value) for point in values] == [(step, float(value)) for step, value in shown[tag]]
    assert [point.step for point in found.scalars["train/loss"]] == list(range(1, 260))
    assert [step for step, _ in found.images["train/images"]] == [1, 150]


def test_logs_in_several_folders_are_one_or_are_merged(tmp_path: Path) -> None:
    """A start undoes what the log that it is part of has from later steps, and nothing of another log."""
    for name, steps, purge in (("old", range(1, 50), 1), ("new", range(20, 30), 20), ("other", range(10, 15), 10)):
        write(tmp_path / name, steps, purge)
    old, new = (next((tmp_path / name).iterdir()) for name in ("old", "new"))
    old.rename(old.with_name("events.out.tfevents.1.host.1.0"))
    new.rename(new.with_name("events.out.tfevents.2.host.1.0"))
    found = read_events(tmp_path / "new", tmp_path / "old")
    assert [point.step for point in found.scalars["train/loss"]] == list(range(1, 30))
    found.merge(read_events(tmp_path / "other"))
    assert [point.step for point in found.scalars["train/loss"]] == sorted([*range(1, 30), *range(10, 15)])
    assert found.files == 3


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 1, pytest.fail)
    file.add(charts.scalars({"train/loss": float("inf")}), 1)
    file.close()
    (point,) = read_events(tmp_path).scalars["train/loss"]
    assert (point.step, point.value) == (1, float("inf"))


def test_no_folder_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none").files == 0


def test_a_file_that_was_cut_short_keeps_what_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 50))
    whole = path.read_bytes()
    for missing in (1, 4, 5, 300):
        path.write_bytes(whole[:-missing])
        found = read_events(tmp_path)
        assert found.problems == [f"{tmp_path.name}/{path.name}: ends within a record, which is left out"]
        assert [point.step for point in found.scalars["train/loss"]] == list(range(1, 50))[
            : 49 if missing < 300 else None
        ]


def test_a_file_that_was_cut_short_in_a_header_keeps_what_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 50))
    path.write_bytes(path.read_bytes() + b"\xff" * 9)  # which would be a record of 2**64 bytes
    found = read_events(tmp_path)
    assert found.problems == [f"{tmp_path.name}/{path.name}: ends within a record, which is left out"]
    assert len(found.scalars["train/loss"]) == 49


def test_a_changed_byte_costs_its_record_and_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 50))
    whole = path.read_bytes()
    at = whole.index(b"train/loss", 1500)
    path.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    found = read_events(tmp_path)
    assert found.problems == [f"{tmp_path.name}/{path.name}: 1 record damaged and left out"]
    assert len(found.scalars["train/loss"]) == 48


def test_every_damage_is_named_or_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 20))
    whole, undamaged = path.read_bytes(), read_events(tmp_path)
    records = whole.index(b"train/images") - 20  # up to the picture, which has a checksum of its own
    for at in range(0, records, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        found = read_events(tmp_path)
        assert found.problems, at
        assert all(point in undamaged.scalars["train/loss"] for point in found.scalars.get("train/loss", []))


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.out.tfevents.1.host.1.0")
    (tmp_path / "events.out.tfevents.2.host.1.0").mkdir()
    assert len(read_events(tmp_path).problems) == 2
