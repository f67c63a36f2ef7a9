"""Where the jobs of the fixture `submit` run, and what they leave."""

from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT

TEMPLATES = ROOT / "slurm"
PLACE = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]

Submit = Callable[..., str]


def text_of(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""
