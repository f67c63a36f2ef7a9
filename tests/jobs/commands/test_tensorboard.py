"""`coatnet tensorboard`: the curves of a run in a browser, and as CSV."""

import csv
import json
import signal
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from tests.support.command import coatnet, environment
from tests.support.event_files import points


def write_run(runs: Path, name: str = "flowers") -> RunFolder:
    """A stage of two starts, the second of which went back to step 2."""
    folder = RunFolder(runs / name / "pretrain")
    folder.create()
    folder.events.record(Event.START, step=0)
    for first, last in ((0, 4), (2, 5)):
        training, validation = (EventFile(part, first + 1, print) for part in (folder.tensorboard, folder.validation))
        for step in range(first + 1, last + 1):
            training.add(charts.scalars({"train/loss": 1 / (step + first), "train/learning_rate": 0.1 * step}), step)
        validation.add(charts.scalars({"validation/top1": 0.1 * last}), last)
        training.close()
        validation.close()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "runs")


def test_the_csv_has_every_point_that_tensorboard_shows_equal_to_the_bit(folder: RunFolder, tmp_path: Path) -> None:
    before = datetime.now(UTC)
    done = coatnet("tensorboard", "runs/flowers", "--csv", "curves.csv", folder=tmp_path)
    assert done.stdout == "curves.csv: 11 points\n"
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert list(rows[0]) == ["run", "stage", "tag", "step", "time", "value"]
    assert {(row["run"], row["stage"]) for row in rows} == {("flowers", "pretrain")}
    found: dict[str, list[tuple[int, np.float32]]] = {}
    for row in rows:
        found.setdefault(row["tag"], []).append((int(row["step"]), np.float32(row["value"])))
        assert abs((datetime.fromisoformat(row["time"]) - before).total_seconds()) < 600
    assert found == points(folder.path)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5]
    assert found["train/loss"][2][1] == np.float32(1 / 5), "the later start counts"
    assert coatnet("tensorboard", "runs", "--csv", "-", folder=tmp_path).stdout == (tmp_path / "curves.csv").read_text()


def test_the_csv_has_the_points_of_reports_of_evaluations(folder: RunFolder, tmp_path: Path) -> None:
    report = folder.path / "evaluations" / "other"
    report.mkdir(parents=True)
    (report / "evaluation.json").write_text("{}")
    file = EventFile(report / "tensorboard", 5, print)
    file.add(charts.scalars({"validation/top1": 0.75}), 5)
    file.close()
    done = coatnet("tensorboard", "runs/flowers", "--csv", "-", folder=tmp_path)
    rows = [row for row in csv.DictReader(done.stdout.splitlines()) if row["stage"] != "pretrain"]
    assert [(row["stage"], row["tag"], row["step"], row["value"]) for row in rows] == [
        ("pretrain/evaluations/other", "validation/top1", "5", "0.75")
    ]


def test_the_csv_names_damage_and_has_the_rest(folder: RunFolder, tmp_path: Path) -> None:
    path = next(folder.tensorboard.glob("events.out.tfevents.*"))
    whole = path.read_bytes()
    at = whole.rindex(b"train/learning_rate")
    path.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    done = coatnet("tensorboard", "runs/flowers", "--csv", "curves.csv", folder=tmp_path)
    assert done.returncode == 0
    assert f"{path.name}: 1 record damaged and left out" in done.stderr
    assert len((tmp_path / "curves.csv").read_text().splitlines()) > 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: not a recipe file or run folder"),
        (["runs/new"], "runs/new: no curves yet; they begin with the first step of a run"),
        (["runs/flowers", "--csv", "missing/curves.csv"], "--csv missing/curves.csv: No such file or directory"),
    ],
)
def test_what_has_no_curves_or_cannot_be_written_is_named(
    folder: RunFolder, tmp_path: Path, arguments: list[str], message: str
) -> None:
    RunFolder(tmp_path / "runs/new/pretrain").create()
    done = coatnet("tensorboard", *arguments, folder=tmp_path)
    assert done.returncode == 78
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.slow
def test_it_serves_on_loopback_until_control_c_and_names_address_and_tunnel(folder: RunFolder, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "trees")
    server = subprocess.Popen(
        [sys.executable, "-m", "jobs", "tensorboard", "runs"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        address = server.stdout.readline().split()[-1]
        tunnel = server.stdout.readline()
        server.stdout.readline()
        base, _, tab = address.partition("/#")
        port = base.rpartition(":")[2]
        assert (base, tab) == (f"http://127.0.0.1:{port}", "custom_scalars")
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in tunnel
        # It listens on no other address.
        found = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True).stdout.split()
        assert not found or found[3] == f"127.0.0.1:{port}"
        for _ in range(200):
            with urllib.request.urlopen(f"{base}/data/runs", timeout=10) as answer:
                names = json.load(answer)
            if len(names) == 4:
                break
        assert sorted(names) == [
            "flowers/pretrain", "flowers/pretrain/validation", "trees/pretrain", "trees/pretrain/validation",
        ]  # fmt: skip
    finally:
        server.send_signal(signal.SIGINT)
        rest, errors = server.communicate(timeout=60)
    assert (server.returncode, rest, errors) == (0, "TensorBoard has ended\n", "")
