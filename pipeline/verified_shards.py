"""What the starts of a run have hashed of its local shards: a record of each rank, which all of them share.

`verified_shards/rank-00000.jsonl` of a run folder has a line for each file that this rank has hashed:
`{"path": ..., "bytes": ..., "mtime_ns": ..., "ctime_ns": ..., "sha256": ...}`.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.files.digest import json_sha256
from data.files.json_records import check_sha256, parse_json
from data.shard_verification import FileState, LocalShard
from pipeline.ranks.distributed import Ranks
from pipeline.runs.json_lines import append_json_line, note_skipped
from pipeline.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

_TOLD = 32  # hexadecimal digits of a sha256 that the leader tells: 128 bits


@dataclass(frozen=True, slots=True)
class _VerifiedShard:
    """A line of the record: a `FileState`, and the sha256 of the file."""

    path: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    def __post_init__(self) -> None:
        check_sha256(self.sha256)


def record_hashed(folder: RunFolder, rank: int, state: FileState, sha256: str) -> None:
    """Add a file that `rank` has hashed to its record in `folder`."""
    path = folder.verified_shards / _record(rank)
    try:
        path.parent.mkdir(exist_ok=True)
        append_json_line(path, {**state._asdict(), "sha256": sha256})
    except OSError as error:
        log.warning("shard %s is verified, but not recorded in %s: %s", state.path, path, error.strerror)


def hashed_by_rank(folder: RunFolder, rank: int) -> dict[FileState, str]:
    """The sha256 of files that the rank of this number has hashed in the stages of the run, in any start."""
    return _read(_records(folder, _record(rank)))


def hashed_by_any_rank(folder: RunFolder, ranks: Ranks, shards: Sequence[LocalShard]) -> dict[FileState, str]:
    """What is known of the files of `shards` from the records of all ranks; all ranks call this.

    The leader reads the records and tells what is in them: if every rank did, a start would open as many files as the
    square of the ranks. Those that do not have the sha256 of the index have the first half of it.
    """
    known = _read(_records(folder, "rank-*.jsonl")) if ranks.is_leader else {}
    told = np.zeros((ranks.broadcast(len(known)), 2, 2), np.int64)
    if ranks.is_leader and known:
        told = np.stack([_digits(map(_state_sha256, known)), _digits(known.values())], axis=1)
    told = ranks.sum(torch.from_numpy(told).to(ranks.device)).cpu().numpy() if len(told) else told
    states = {}
    for shard in shards if len(told) else ():
        with suppress(OSError):  # reading it reports the error
            state = FileState.of(shard.path, os.stat(shard.path))
            states[_state_sha256(state)[:_TOLD]] = state, shard.sha256
    found = {}
    for state_digits, digits in told[np.isin(told[:, 0, 0], _digits(states)[:, 0])]:
        if own := states.get(state_digits.tobytes().hex()):
            (state, indexed), sha256 = own, digits.tobytes().hex()
            found[state] = indexed if indexed.startswith(sha256) else sha256
    return found


def _record(rank: int) -> str:
    return f"rank-{rank:05d}.jsonl"


def _records(folder: RunFolder, name: str) -> list[Path]:
    return sorted(folder.path.parent.glob(f"*/{folder.verified_shards.name}/{name}"))


def _read(paths: Iterable[Path]) -> dict[FileState, str]:
    found: dict[FileState, str] = {}
    for path in paths:
        skipped, lines = list[int](), list[str]()
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            log.warning("%s: cannot be read (%s), so its shards are verified again", path, error.strerror)
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json(_VerifiedShard, line)
            except ValueError:
                skipped.append(number)
                continue
            found[FileState(entry.path, entry.bytes, entry.mtime_ns, entry.ctime_ns)] = entry.sha256
        if skipped:
            note_skipped(path, tuple(skipped))
    return found


def _state_sha256(state: FileState) -> str:
    return json_sha256(list(state))


def _digits(sha256: Iterable[str]) -> NDArray[np.int64]:
    """The first half of each hexadecimal sha256: (N, 2)."""
    halves = b"".join(bytes.fromhex(one[:_TOLD]) for one in sha256)
    return np.frombuffer(halves, np.int64).reshape(-1, 2)
