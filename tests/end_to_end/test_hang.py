"""Runs of two ranks of which one hangs: the stacks of every rank are written, and the message names the late one."""

import os
import re
import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from data.building.build import build_shards
from tests.support.command import coatnet, ended, rank, start, wait_until
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow(seconds=25)
# Steps take a fraction of a second even on a busy machine.
LIMITS = "watchdog={setup_seconds: 300, least_seconds: 15, factor: 2}"
NODE = socket.gethostname()


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_does_not_respond_is_named(late: int, shards: Path, tmp_path: Path) -> None:
    """The healthy rank waits in native code, in the all-reduce, where no Python signal handler runs."""
    recipe = write_recipe(tmp_path, shards)
    logs = [tmp_path / f"runs/test/pretrain/logs/rank-{number:05d}.log" for number in (0, 1)]
    # Without saves: the first one of a start has the limit of the setup, and the hang must not be in it.
    changes = ["pretrain.steps=3000", "pretrain.checkpoint.every_steps=3000"]
    process = start("train", recipe, "pretrain", *changes, LIMITS)
    wait_until(lambda: logs[0].exists() and "step 4/3000" in logs[0].read_text(), process)
    rank(process, late).suspend()
    message = ended(process)
    assert process.returncode == 75, message
    assert f"hang: rank {late} on {NODE} does not answer, as when a process or a node is stopped; " in message
    # The norms that a report shows are summed over the ranks, too.
    assert re.search(r"the others are in section (step|report)\b", message)
    assert re.search(rf"\(rank {1 - late} has been in section \w+ for [\d,]+ s; the limit is \d+ s\)", message)
    assert "the same command continues from the last checkpoint" in message
    healthy = logs[1 - late].read_text()
    assert f"; the stacks of all threads of rank {1 - late}:" in healthy
    assert re.search("in (take|report)_step", healthy)


def test_a_rank_whose_storage_does_not_respond_is_named_and_all_stacks_are_written(
    pictures: Path, tmp_path: Path
) -> None:
    """Opening one shard blocks, as it does on a network file system whose server is gone."""
    build_shards(pictures, tmp_path / "shards", samples_per_shard=1, validation_per_class=5)
    recipe = write_recipe(tmp_path, tmp_path / "shards")
    run = tmp_path / "runs/test/pretrain"
    logs = [run / f"logs/rank-{number:05d}.log" for number in (0, 1)]
    # Small windows and more shards than are kept open, so that each is soon opened again by whichever rank needs it.
    changes = ["pretrain.steps=3000", "data.shuffle_window=2"]
    process = start("train", recipe, "pretrain", *changes, LIMITS)
    wait_until(lambda: logs[0].exists() and "step 4/3000" in logs[0].read_text(), process)
    shard = tmp_path / "shards/train/train-000020.tar"
    os.mkfifo(tmp_path / "blocks")
    shard.rename(tmp_path / "aside.tar")
    (tmp_path / "blocks").rename(shard)
    message = ended(process)
    assert process.returncode == 75, message
    named = re.search(rf"hang: rank (\d) on {NODE} is behind, in section step, reading micro-batch \d of step", message)
    assert named, message
    assert "; the others are in section step, " in message
    late = int(named.group(1))
    assert "shard.py" in logs[late].read_text()
    assert "in _open" in logs[late].read_text()
    assert "all_reduce" in logs[1 - late].read_text()

    shutil.move(tmp_path / "aside.tar", shard)
    assert tarfile.is_tarfile(shard)
    done = coatnet("train", recipe, "pretrain", *changes, "resources.time_limit=0:00:01")
    assert "stopped by the time limit" in done.stderr
