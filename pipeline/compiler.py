"""What torch.compile and Triton need of a machine."""

import os
import shutil
import sysconfig
from pathlib import Path

from pipeline.errors import ConfigError


def check_compiler(where: str, setting: str = "compile", what: str = "torch.compile") -> None:
    """Check that this machine has the compiler that torch.compile and Triton need, and Python's headers.

    Args:
        where: begins the message.
        setting: that needs them.
        what: it uses.

    Raises:
        ConfigError: it has not.
    """
    # Torch generates C++ for CPUs, and C for the launchers of its GPU kernels.
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "cc"]
    if not any(name and shutil.which(name) for name in names):
        raise ConfigError(
            f"{where}{setting}: {what} needs a C++ compiler and there is none on PATH; "
            f"install one (on Debian: apt-get install g++) or leave {setting} out"
        )
    # Both kinds of generated code are modules of Python.
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise ConfigError(
            f"{where}{setting}: {what} needs Python's headers and there is no {header}; install them (on Debian: "
            f"apt-get install python3-dev) or leave {setting} out"
        )


def compiler_options(*, deterministic: bool) -> dict[str, bool] | None:
    """Options of torch.compile for a stage.

    Inductor's deterministic mode still times configurations of the kernels that compute element by element, as their
    results should not depend on it. With one configuration all ranks and all starts run the same code.
    """
    return {"triton.autotune_pointwise": False} if deterministic else None
