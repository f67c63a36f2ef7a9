"""Jobs of the templates in `slurm/` whose tasks run a small script instead of a rank."""

import stat
from pathlib import Path

import pytest

from tests.servers.slurm import SlurmCluster
from tests.slurm.submitted import PLACE, TEMPLATES, Submit


@pytest.fixture
def submit(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits a template whose tasks run the given lines of shell as `coatnet`; the log is `log` in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # what launch.sh sets by default is tested

    def submitted(
        task: str,
        *arguments: str,
        template: str = "pretrain",
        options: tuple[str, ...] = (),
        folder: Path = TEMPLATES,
    ) -> str:
        program = tmp_path / "coatnet"
        program.write_text(f"#!/usr/bin/env bash\n{task}\n")
        program.chmod(stat.S_IRWXU)
        monkeypatch.setenv("COATNET", str(program))
        script = str(folder / f"{template}.sbatch")
        return slurm.run("sbatch", "--parsable", "--output=log", *PLACE, *options, script, *arguments).strip()

    return submitted
