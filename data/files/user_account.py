"""The account that runs the program: in containers it may be a number without a name or a home folder."""

import getpass
import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from data.errors import DataError


def account_name() -> str:
    """The name of this account; its number if it has none."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        return str(os.getuid())


def temporary_folder() -> str:
    """The folder for temporary files: TMPDIR, or the first of the system's that can be written.

    Raises:
        DataError: none can be written.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise DataError(
            "no folder for temporary files can be written, neither TMPDIR nor /tmp, /var/tmp or the working directory; "
            "set TMPDIR to a folder that can be written"
        ) from None


def unused_temporary_folder() -> str | None:
    """What to say where the environment names a folder for temporary files and they go elsewhere; None otherwise."""
    name = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    try:
        used = temporary_folder()
    except DataError:  # whoever needs one says so
        return None
    if name is None or os.path.abspath(wanted := os.environ[name]) == os.path.abspath(used):
        return None
    why = "full, or not writable for this account" if os.path.isdir(wanted) else "not a folder that exists"
    return f"{name}: {wanted} is {why}; temporary files go to {used}"


def complete_account(environment: MutableMapping[str, str]) -> None:
    """Add to `environment` what libraries take from an account, where this one has it not, or not usable.

    Without a name getpass fails, which torch asks for the folders of its compiler. Triton, and DeepSpeed with it, keep
    what they compile in the home folder; without one they fail, or write into the working directory.
    """
    name = account_name()
    if name == str(os.getuid()):
        environment.setdefault("USER", name)
    try:
        temporary = temporary_folder()
    except DataError:  # whoever needs one says so
        return
    home, own = os.path.expanduser("~"), f"{temporary}/coatnet-compiled-{os.getuid()}"
    if not _usable(own):
        own = f"{own}-{os.getpid()}"
    if not os.path.isdir(home) or not _usable(f"{home}/.triton"):
        environment.setdefault("TRITON_HOME", own)
        environment.setdefault("TRITON_CACHE_DIR", f"{own}/triton")
    if not _usable(f"{temporary}/torchinductor_{name}"):
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{own}/inductor")


def _usable(folder: str) -> bool:
    """Whether this account can write the folder, or create it where it does not exist."""
    path = Path(folder)
    if path.exists():
        return path.is_dir() and os.access(path, os.W_OK | os.X_OK) and path.stat().st_uid == os.getuid()
    return path.is_absolute() and not path.is_symlink() and os.access(path.parent, os.W_OK | os.X_OK)
