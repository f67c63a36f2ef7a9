"""What the errors of Slurm's commands mean: stand-ins that print what Slurm 22 does."""

from pathlib import Path

import pytest

from jobs.scheduler import slurm
from pipeline.errors import ConfigError

NO_CLUSTER = (
    "sinfo: error: fetch_config: DNS SRV lookup failed\nsinfo: fatal: Could not establish a configuration source"
)
NO_FILE = "sinfo: error: ClusterName needs to be specified\nsinfo: fatal: Unable to process configuration file"
FETCH = "sinfo: error: fetch_config: failed: Unable to contact slurm controller (connect failure)"
DOWN = "slurm_load_partitions: Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize(
    ("said", "kind", "code", "finds_one"),
    [
        (NO_CLUSTER, slurm.NotConfigured, 78, False),
        (NO_FILE, slurm.NotConfigured, 78, False),
        (f"{FETCH}\n{NO_CLUSTER}", slurm.SchedulerDown, 75, True),
        (DOWN, slurm.SchedulerDown, 75, True),
        ("sinfo: error: Invalid user", ConfigError, 78, True),
    ],
)
def test_a_cluster_that_is_not_configured_is_told_from_one_that_does_not_answer(
    said: str, kind: type[Exception], code: int, finds_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sinfo", "squeue"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{said}' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError if code == 78 else slurm.SchedulerDown) as raised:
        slurm.find_cluster()
    assert (raised.type, raised.value.exit_code) == (kind, code)
    assert slurm.has_cluster() == finds_one
