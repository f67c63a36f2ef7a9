"""What tests of several commands share."""

from pathlib import Path

import pytest

from tests.jobs.runs import MadeRun


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """A run on a machine without Slurm, whose user stands in the folder above `runs`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return MadeRun(tmp_path)
