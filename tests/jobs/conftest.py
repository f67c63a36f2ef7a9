"""Fixtures of several commands' tests."""

from pathlib import Path

import pytest

from tests.jobs.runs import MadeRun


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """A run on a machine without Slurm, with the folder above `runs` as the working directory."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return MadeRun(tmp_path)
