"""Packages of the same names in a user's folder: the program must find its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.files.child_process import PROGRAM_FOLDER, own_packages_first
from jobs.packages import outside_environment, secure_packages
from jobs.scheduler import slurm
from tests.support.command import environment
from tests.support.paths import ROOT
from tests.support.recipes import write_recipe

FOREIGN = "raise ImportError('not the package of this program')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with modules named as our packages, which must not be imported."""
    for name in ("models.py", "data/__init__.py", "pipeline/__init__.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(FOREIGN)
    return tmp_path


def run(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own; a fork of the tests' server has imported our packages."""
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment() | variables, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow(seconds=20)
def test_shards_are_built_and_a_recipe_runs_beside_foreign_packages(folder: Path, pictures: Path) -> None:
    (folder / "jobs.py").write_text(FOREIGN)  # as in another checkout
    settings = {"resources": {"ranks": 1, "gpus_per_rank": 0}}
    recipe = write_recipe(folder, folder / "shards", **settings)
    command = str(Path(sys.executable).with_name("coatnet"))  # the console script puts its own folder on the path
    built = run(command, "shards", "build", str(pictures), "shards", "--validation-per-class=5", folder=folder)
    assert built.returncode == 0, built.stderr
    short = ["pretrain.steps=2", "pretrain.optimizer.warmup_steps=1"]
    trained = run(command, "train", recipe.name, "pretrain", *short, folder=folder)
    assert trained.returncode == 0, trained.stderr
    (folder / "jobs.py").unlink()  # `python -m jobs` would mean that one
    shown = run("-m", "jobs", "status", folder=folder)
    assert shown.returncode == 0, shown.stderr
    assert "pretrain  done" in shown.stdout


def test_the_working_directory_is_not_searched_for_anything(folder: Path) -> None:
    (folder / "typing_extensions.py").write_text(FOREIGN)
    done = run("-m", "jobs", "recipes", "--json", folder=folder)
    assert done.returncode == 0, done.stderr


def test_packages_on_pythonpath_do_not_come_first(folder: Path) -> None:
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = run("-P", "-m", "jobs", "recipes", "--json", folder=folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


def test_a_foreign_package_that_was_imported_before_is_named_with_the_fix(folder: Path) -> None:
    (folder / "models.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); import models; from jobs.cli import main; main()"
    done = run("-c", program, folder=folder)
    assert done.returncode == 78
    assert done.stderr == (
        f"error: package models: Python finds {folder}/models.py instead of {PROGRAM_FOLDER}/models; rename that file or "
        "folder, or remove its folder from PYTHONPATH\n"
    )


def test_our_packages_come_first_for_processes_that_are_started_and_slurm_gets_the_users_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("jobs.packages._OUTSIDE", {"PYTHONPATH": "/theirs", "PYTHONSAFEPATH": None})
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    secure_packages()
    secure_packages()  # a second time, it changes nothing
    assert os.environ["PYTHONPATH"] == own_packages_first()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/theirs"
    assert os.environ["PYTHONSAFEPATH"] == "1"
    assert outside_environment()["PYTHONPATH"] == "/theirs"
    assert "PYTHONSAFEPATH" not in outside_environment()
    program = tmp_path / "squeue"
    program.write_text('#!/bin/sh\necho "$PYTHONPATH $PYTHONSAFEPATH"\n')
    program.chmod(0o700)
    assert slurm.call(str(program)) == "/theirs \n"
