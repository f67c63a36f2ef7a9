"""Forked commands behave like those of a new interpreter."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import prefork
from tests.support.command import coatnet, environment, ranks, start, wait_until
from tests.support.paths import ROOT
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow
START_AND_WAIT = """
import sys, time
from tests.support.command import start

process = start("train", sys.argv[1], "pretrain", "pretrain.steps=30000")
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("recipes", "show", "demo"), 0),
        (("run", "absent.yaml"), 78),
        (("run", "--no-such-option"), 2),
    ],
)
def test_exit_code_and_output_equal_those_of_a_new_interpreter(
    arguments: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    forked = coatnet(*arguments, folder=tmp_path)
    fresh = coatnet(*arguments, folder=tmp_path, fresh=True)
    assert (forked.returncode, forked.stdout, forked.stderr) == (code, fresh.stdout, fresh.stderr)
    assert fresh.returncode == code
    assert forked.stdout + forked.stderr


def test_a_command_runs_in_its_folder(tmp_path: Path) -> None:
    here = Path.cwd()
    assert coatnet("recipes", "copy", "demo", folder=tmp_path).returncode == 0
    assert (tmp_path / "demo.yaml").exists()
    assert Path.cwd() == here


def test_a_command_has_its_own_environment_and_the_next_one_does_not(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    arguments = ("train", "recipe.yaml", "finetune")
    assert "the environment has no WORLD_SIZE" in coatnet(*arguments, folder=tmp_path, RANK="0").stderr
    assert "stage pretrain is not done" in coatnet(*arguments, folder=tmp_path).stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)], ids=["SIGTERM", "SIGKILL"]
)
def test_ranks_are_forks_and_signals_reach_them_as_processes(
    number: signal.Signals, code: int, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    process = start("train", recipe, "pretrain", "pretrain.steps=30000")
    log = tmp_path / "runs/test/pretrain/logs/rank-00000.log"
    wait_until(lambda: log.exists() and "step 2/" in log.read_text(), process)
    command = psutil.Process(process.pid)
    started = ranks(process)
    assert len(started) == 2
    for one in (command, *started):
        assert "tests.support.prefork" in one.cmdline()  # no interpreter was started
        assert one.cwd() == str(Path.cwd())
        assert os.getpgid(one.pid) == one.pid  # see `launch_ranks`
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert process.wait(120) == process.returncode == code
    assert psutil.wait_procs(started, 60)[1] == []


def test_the_command_of_a_rank_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[list[str]] = []
    monkeypatch.setattr(prefork, "_Rank", lambda arguments, options: forked.append(arguments))
    for options in ([], ["-P"]):
        prefork._popen([sys.executable, *options, "-m", "jobs", "train", "recipe.yaml"])
    assert forked == [["train", "recipe.yaml"]] * 2
    other: Any = prefork._popen([sys.executable, "-c", "print('started')"], stdout=subprocess.PIPE)
    assert other.communicate(timeout=60)[0] == b"started\n"
    assert len(forked) == 2


def test_everything_dies_with_the_process_of_the_tests(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    command = [sys.executable, "-c", START_AND_WAIT, str(recipe)]
    session = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    try:
        assert session.stdout is not None
        launcher = psutil.Process(int(session.stdout.readline()))
        log = tmp_path / "runs/test/pretrain/logs/rank-00000.log"
        wait_until(lambda: log.exists() and "step 2/" in log.read_text(), session)
        processes = [*psutil.Process(session.pid).children(recursive=True), launcher, *launcher.children()]
        assert len({process.pid for process in processes}) >= 5  # server, keeper, launcher and two ranks
    finally:
        session.kill()
        session.wait()
    assert psutil.wait_procs(processes, 60)[1] == []
