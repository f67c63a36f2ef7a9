"""Verification of the local shards of a stage, behind it: which rank hashes which, and what earlier starts have hashed.

`verified_shards/rank-00000.jsonl` of a run folder has a line for each file that this rank has hashed:
`{"path": ..., "bytes": ..., "mtime_ns": ..., "ctime_ns": ..., "sha256": ...}`. A file that has not changed since is not
hashed again by any stage of the run.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from data.files.digest import json_sha256
from data.files.json_records import check_sha256, parse_json
from data.shard_verification import FileState, LocalShard, ShardVerifier, local_shards, unverified
from data.text.counted import counted
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import Plan, TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.json_lines import append_json_line, note_skipped
from pipeline.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_COMPARED = 16  # shards


class ShardVerification:
    """This rank's part in verifying the local shards that a stage reads; all ranks create it together.

    Each shard is hashed by one rank, those that the stage needs first at the beginning. Ranks on nodes with shards of
    their own verify those of their node.

    Args:
        plan: of the stage.
        folder: remembers what is verified.
        ranks: of the run.
    """

    def __init__(self, plan: Plan, folder: RunFolder, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self.remark: str | None = None
        """What there is to verify and what earlier starts have verified, over all ranks; None for no local shards."""
        shards = _shards_of(plan) if plan.stage.data.verify_shards else []
        todo: list[LocalShard] = []
        if shards:
            group = _ranks_with_the_same_files(shards, ranks)
            own = shards[group.index(ranks.rank) :: len(group)]
            todo = unverified(own, _hashed_by_earlier_starts(folder))
            numbers = [len(todo), sum(shard.bytes for shard in todo), len(own) - len(todo)]
            left, size, done = ranks.sum(torch.tensor(numbers, dtype=torch.float64, device=ranks.device)).tolist()
            what = counted(round(left), "local shard") + f" to verify ({size / 1e9:.1f} GB)"
            self.remark = f"{what}, {round(done):,} verified by earlier starts"
        self._verifier = ShardVerifier(todo, self._record)

    def check(self) -> bool:
        """Whether this rank has shards left to verify.

        Raises:
            DataError: a shard is missing, or is not the indexed one.
            StorageDown: one cannot be read.
        """
        running = self._verifier.running  # before the result, which is final only if it is not
        self._verifier.check()
        return running

    def wait(
        self,
        watchdog: Watchdog,
        begin: Callable[[], None],
        stop_flags: Callable[[], Sequence[float]] = lambda: (),
    ) -> Sequence[float]:
        """Wait until the ranks have verified all shards, or one of them wants to stop; all of them call this.

        Args:
            watchdog: of this rank.
            begin: called if there is something to wait for.
            stop_flags: numbers that are not 0 if this rank wants to stop.

        Returns:
            The sums of the flags if there are shards left; nothing if all are verified.

        Raises:
            DataError, StorageDown: as for `check`.
        """
        while True:
            with watchdog.section("verification"):
                numbers = torch.tensor([float(self.check()), *stop_flags()], device=self._ranks.device)
                running, *flags = self._ranks.sum(numbers).tolist()
                if not running:
                    return []
                if any(flags):
                    return flags
                begin()
                begin = _do_nothing
                self._verifier.wait(_POLL_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._verifier.close()

    def _record(self, state: FileState, sha256: str) -> None:
        path = self._folder.verified_shards / f"rank-{self._ranks.rank:05d}.jsonl"
        try:
            path.parent.mkdir(exist_ok=True)
            append_json_line(path, {**state._asdict(), "sha256": sha256})
        except OSError as error:
            log.warning("shard %s is verified, but not recorded in %s: %s", state.path, path, error.strerror)


def _do_nothing() -> None:
    pass


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


def _shards_of(plan: Plan) -> list[LocalShard]:
    """The local shards that the stage reads, each once, in the order of need."""
    found = []
    if isinstance(plan, TrainPlan):
        found += local_shards(plan.train, plan.order.shards_by_need(plan.steps))
    found += local_shards(plan.validation, np.flatnonzero(plan.validation.shard_samples).tolist())
    return list(dict.fromkeys(found))


def _ranks_with_the_same_files(shards: Sequence[LocalShard], ranks: Ranks) -> list[int]:
    """The ranks that see the same files as this one, and not copies, which have changed at another nanosecond."""
    states: list[FileState | None] = []
    for shard in shards[:: -(-len(shards) // _COMPARED)]:
        states.append(None)
        with suppress(OSError):  # reading it reports the error
            states[-1] = FileState.of(shard.path, os.stat(shard.path))
    digests = ranks.gather_texts(json_sha256(states))
    return [rank for rank, digest in enumerate(digests) if digest == digests[ranks.rank]]


def _hashed_by_earlier_starts(folder: RunFolder) -> dict[FileState, str]:
    """The sha256 of files that the stages of the run have hashed."""
    found: dict[FileState, str] = {}
    for path in sorted(folder.path.parent.glob(f"*/{folder.verified_shards.name}/rank-*.jsonl")):
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
