"""Python processes of this program, in which a `models.py` or `data` folder of a user cannot replace our packages."""

import os
import sys
from pathlib import Path

PROGRAM_FOLDER = Path(__file__).resolve().parents[2]
"""The folder that holds our packages and `slurm/`: a checkout, or where the program is installed."""


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours, without the working directory on its import path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def own_packages_first() -> dict[str, str]:
    """Environment variables with which a Python process finds our packages before any others of their names."""
    others = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(PROGRAM_FOLDER))
    ]
    return {"PYTHONPATH": os.pathsep.join([str(PROGRAM_FOLDER), *others]), "PYTHONSAFEPATH": "1"}
