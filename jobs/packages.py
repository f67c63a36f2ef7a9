"""The program's own packages: a `models.py` or a `data` package in a user's folder must not take their place.

Imports nothing of ours, so that it can run before anything else does.
"""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

_PROGRAM_FOLDER = Path(__file__).resolve().parents[1]
_PACKAGES = ("data", "models", "pipeline")
_EXIT_CONFIG = 78  # data.errors.EXIT_CONFIG, which may be out of reach here
_OUTSIDE: dict[str, str | None] = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}


def secure_packages() -> None:
    """Make `data`, `models` and `pipeline` those of this program, in this process and in those that it starts.

    Python looks for them in the working directory first (`python -m jobs`), or in the folders of PYTHONPATH. The former
    is no longer searched, as in the processes that this one starts. If they cannot be put first, the process exits with
    78 and names the foreign file.
    """
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) == os.path.realpath(".") != str(_PROGRAM_FOLDER):
        del sys.path[0]
    if any(_foreign(name) for name in _PACKAGES):
        sys.path.insert(0, str(_PROGRAM_FOLDER))
    for name in _PACKAGES:
        if foreign := _foreign(name):
            shown = foreign.encode("unicode_escape").decode()  # data.text.printable may be the one that is not ours
            print(
                f"error: package {name}: Python finds {shown} instead of {_PROGRAM_FOLDER / name}; rename that file "
                "or folder, or remove its folder from PYTHONPATH",
                file=sys.stderr,
            )
            sys.exit(_EXIT_CONFIG)
    from data.files.child_process import own_packages_first  # ours by now

    os.environ |= own_packages_first()


def outside_environment() -> Mapping[str, str]:
    """The environment variables as this process was given them, for programs that are not ours: a job's container has
    packages of its own.
    """
    return {name: value for name, value in (os.environ | _OUTSIDE).items() if value is not None}


def _foreign(name: str) -> str | None:
    """The file that `import NAME` takes, if it is not ours."""
    spec = find_spec(name)
    origin = spec.origin if spec else None
    own = _PROGRAM_FOLDER / name / "__init__.py"
    return None if origin is not None and os.path.realpath(origin) == os.path.realpath(own) else str(origin)
