"""`coatnet status` of a run that trains, is killed, is stopped and is done."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import coatnet, ended, kill, start, wait_until
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow(seconds=40)


def test_a_run_on_this_machine_is_shown_in_all_its_states(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)

    def pretrain() -> dict[str, Any]:
        result = coatnet("status", recipe, "--json")
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)["stages"][0]
        return found

    assert pretrain()["state"] == "not started"
    long: list[str | Path] = ["run", recipe, "pretrain.steps=3000"]
    process = start(*long)
    wait_until(lambda: (pretrain()["step"] or 0) > 10, process)
    found = pretrain()
    assert (found["state"], found["steps"], found["restarts"], found["reason"]) == ("running", 3000, 0, "")
    assert found["images_per_second"] > 0
    assert found["seconds_left"] > 0
    kill(process, "everyone")
    found = pretrain()
    assert (found["state"], found["reason"]) == ("stopped", "its processes ended without a message")
    assert found["checkpoint"] is not None

    process = start(*long)
    wait_until(lambda: pretrain()["restarts"] == 1 and pretrain()["seconds_left"] is not None, process)
    os.kill(process.pid, signal.SIGTERM)
    ended(process)
    found = pretrain()
    assert found["state"] == "stopped"
    assert found["reason"].startswith(
        f"stopped by SIGTERM after step {found['step']:,}, saved as {found['checkpoint']}"
    )
    assert "the same command continues" in coatnet("logs", recipe, "pretrain", "-n", "1").stdout


def test_a_chain_that_is_done_and_one_that_is_refused(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    small = ["pretrain.steps=6", "finetune.steps=2"]
    assert coatnet("run", recipe, *small).returncode == 0
    shown = coatnet("status", fresh=True, folder=tmp_path).stdout
    rows = [line.split() for line in shown.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["pretrain", "done", "6/6"], ["finetune", "done", "2/2"], ["evaluate", "done", "2/2"],
    ]  # fmt: skip
    assert all("%" in " ".join(row) for row in rows)

    (tmp_path / "runs/test/pretrain/result.json").unlink()
    for file in (tmp_path / "runs/test/pretrain/checkpoints").glob("*/manifest.json"):
        file.write_text("{}")
    refused = coatnet("train", recipe, "pretrain", *small)
    assert refused.returncode == 78
    found = json.loads(coatnet("status", recipe, "--json").stdout)["stages"][0]
    assert found["state"] == "failed"
    assert found["reason"] in refused.stderr
