"""Writing a run folder: whether this account can, and that one process at a time does."""

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from data.errors import CoatnetError
from data.files.file_lock import OTHER_NODE_SECONDS, OWN_NODE_SECONDS, RELEASED_LATER, lock_within
from pipeline.errors import ConfigError, DiskFull, RunInUse
from pipeline.runs.event_log import Event, EventLog, RunEvent

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def cannot_be_written(run: Path, error: OSError) -> CoatnetError:
    """The error for a run folder that cannot be written; a full disk may have room again later."""
    if error.errno in _DISK_FULL:
        return DiskFull(f"run folder {run}: {error.strerror}; make room, or set runs to a folder on another disk")
    return ConfigError(f"run folder {run}: {error.strerror}; set runs to a folder you can write")


def check_writable(run: Path, parts: Sequence[Path]) -> None:
    """Check that this account can write those of `parts` of the folder that exist.

    Raises:
        ConfigError: it cannot, for example because another account created them.
    """
    for part in parts:
        if part.exists() and not os.access(part, os.W_OK):
            owner = part.stat().st_uid
            whose = "" if owner == os.getuid() else f", since it belongs to another user (uid {owner})"
            raise ConfigError(
                f"run folder {run}: {part.relative_to(run)} cannot be written{whose}; have its rights changed, or give "
                "the recipe another name"
            )


def hold(
    lock_file: Path, events: EventLog, node: str, *, own: float = OWN_NODE_SECONDS, other: float = OTHER_NODE_SECONDS
) -> BinaryIO:
    """The open `lock_file` of the run folder, locked for this process, which runs on `node`, until it is closed.

    The kernel releases the lock of a process that ends. That of a node which went down is released by the file server,
    later: it is waited for `own` seconds, and `other` seconds in all if the last start was on another node.

    Raises:
        ConfigError: another process of this node runs the stage.
        RunInUse: another node has the lock.
        OSError: the file cannot be opened.
    """
    run = lock_file.parent
    if lock := lock_within(lock_file, own):
        return lock
    holder = next(reversed(events.of(Event.BEGIN)), None)
    there = str(holder.facts.get("node") or "") if holder else ""
    if not there or there == node:
        raise ConfigError(f"{run}: another process is running this stage{_since(holder)}; wait for it or stop it")
    if lock := lock_within(lock_file, other - own):
        return lock
    raise RunInUse(
        f"{run}: node {there} is running this stage{_since(holder)}, and last wrote to this folder "
        f"{_quiet_seconds(run, events):,.0f} s ago; wait for it or stop it. {RELEASED_LATER}"
    )


def _since(holder: RunEvent | None) -> str:
    if holder is None:
        return ""
    pid = holder.facts.get("pid")
    return f", process {pid} since {holder.time}" if pid else f", since {holder.time}"


def _quiet_seconds(run: Path, events: EventLog) -> float:
    """Seconds since the holder of the folder wrote to one of the files that a run writes all the time."""
    written = [0.0]
    for path in (events.path, run / "progress.json", run / "logs" / "rank-00000.log"):
        if path.exists():
            written.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(written))
