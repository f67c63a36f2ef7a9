"""Which run a folder holds: an id made at its first start, which its checkpoints and the places it claims have, too.

A folder that was moved stays the same run. A copy is a run of its own, which continues from what lies in the copy: what
the original stores elsewhere remains the original's.
"""

import json
import os
import re
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from data.errors import raise_if_passing
from data.files.atomic_file import write_atomically
from data.files.json_records import check_at_least, parse_json, to_json
from data.files.regular_file import read_regular
from pipeline.errors import ConfigError

_FILE = ".run.json"  # in the run folder
_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class BranchOrigin:
    """The run that another one is a branch of."""

    run: str | None
    """Its id; None for runs of earlier versions."""
    folder: str
    """Its folder, when it was left."""
    step: int
    """Steps that both have in common."""

    def __post_init__(self) -> None:
        if self.run is not None:
            check_run_id(self.run)
        check_folder(self.folder)
        check_at_least(0, step=self.step)


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The identity of a run."""

    id: str
    folder: str
    """Of the run, at its last start."""
    inode: int
    """Of that folder."""
    copied_from: tuple[str, ...] = ()
    """The runs whose folders were copied to make this one, oldest first."""
    branch_of: BranchOrigin | None = None
    """The run that it left by other settings, if it is a branch."""

    def __post_init__(self) -> None:
        for run in (self.id, *self.copied_from):
            check_run_id(run)
        check_folder(self.folder)

    @property
    def ids(self) -> frozenset[str]:
        """Runs whose checkpoints are this one's past: its own and those it was copied from."""
        return frozenset((self.id, *self.copied_from))


def check_run_id(value: str) -> None:
    """
    Raises:
        ValueError: it is not an id of a run.
    """
    if not _ID.fullmatch(value):
        raise ValueError(f"the id of a run must be 32 hexadecimal digits, not {value[:40]!r}")


def check_folder(value: str) -> None:
    """
    Raises:
        ValueError: it is not the absolute path of a folder.
    """
    if not value.startswith("/") or "\0" in value:
        raise ValueError(f"folder: must be an absolute path, not {value[:80]!r}")


def identity_of(path: Path) -> RunIdentity | None:
    """The identity of the run in the folder `path`; None before its first start. Writes nothing.

    For a copy that has not been started it is a new one each time, which no place and no checkpoint has.

    Raises:
        ConfigError: the record of it is damaged.
    """
    recorded = _recorded(path)
    if recorded is None:
        return None
    here = replace(recorded, folder=os.path.realpath(path), inode=path.stat().st_ino)
    if _is_copy(recorded, path):
        return replace(here, id=uuid.uuid4().hex, copied_from=(*recorded.copied_from, recorded.id))
    return here


def establish_identity(path: Path, branch_of: BranchOrigin | None = None) -> RunIdentity:
    """The identity of the run in the folder `path`, written down for a run that is new, moved or copied.

    `branch_of` is what a new one is a branch of.

    Raises:
        ConfigError: the record of it is damaged.
    """
    found = identity_of(path) or RunIdentity(
        uuid.uuid4().hex, os.path.realpath(path), path.stat().st_ino, branch_of=branch_of
    )
    if found != _recorded(path):
        write_atomically(path / _FILE, json.dumps(to_json(found)) + "\n")
    return found


def _recorded(path: Path) -> RunIdentity | None:
    try:
        return parse_json(RunIdentity, read_regular(path / _FILE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise_if_passing(error)
        raise ConfigError(
            f"{path / _FILE}: damaged ({error}); restore it from a copy, or remove it: the folder then counts as that "
            "of a new run, which continues from the checkpoints in it"
        ) from None


def _is_copy(recorded: RunIdentity, path: Path) -> bool:
    """Whether the folder that was recorded is still there, as another one, so that `path` was not moved from there."""
    if recorded.folder == os.path.realpath(path):
        return False
    here = path.stat()
    try:
        there = os.stat(recorded.folder)
        original = None if os.path.samestat(here, there) else _recorded(Path(recorded.folder))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a folder of somebody else
        return here.st_ino != recorded.inode
    except (ConfigError, ValueError):  # damaged, or no path at all
        return False
    return original is not None and original.id == recorded.id and here.st_ino != recorded.inode
