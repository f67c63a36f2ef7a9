"""Python processes of this program, in which a `models.py` or `data` folder of a user cannot replace our packages."""

import ctypes
import os
import signal
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


def end_with_parent(parent: int, code: int) -> None:
    """Let the kernel kill this process when its parent ends, however that does; ends it with `code` if process `parent`
    is its parent no longer."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(code)
