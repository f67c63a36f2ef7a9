"""Verification of the local shards of a stage, behind it: which rank hashes which, and what earlier starts have hashed.

A file that has not changed since is not hashed again by any stage of the run, see `pipeline/verified_shards.py`.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

import numpy as np
import torch

from data.files.digest import json_sha256
from data.shard_verification import FileState, LocalShard, ShardVerifier, local_shards, unverified
from data.text.counted import counted
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import Plan, TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.run_folder import RunFolder
from pipeline.verified_shards import hashed_by_any_rank, hashed_by_rank, record_hashed

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
        self._ranks = ranks
        self.remark: str | None = None
        """What there is to verify and what earlier starts have verified, over all ranks; None for no local shards."""
        shards = _shards_of(plan) if plan.stage.data.verify_shards else []
        todo: list[LocalShard] = []
        if shards:
            group = _ranks_with_the_same_files(shards, ranks)
            own = shards[group.index(ranks.rank) :: len(group)]
            known = hashed_by_rank(folder, ranks.rank)
            todo = unverified(own, known)
            # As in the first start, or on another number of ranks.
            if ranks.sum(torch.tensor([len(todo)], device=ranks.device)).item():
                todo = unverified(todo, known | hashed_by_any_rank(folder, ranks, todo))
            numbers = [len(todo), sum(shard.bytes for shard in todo), len(own) - len(todo)]
            left, size, done = ranks.sum(torch.tensor(numbers, dtype=torch.float64, device=ranks.device)).tolist()
            what = counted(round(left), "local shard") + f" to verify ({size / 1e9:.1f} GB)"
            self.remark = f"{what}, {round(done):,} verified by earlier starts"
        self._verifier = ShardVerifier(todo, partial(record_hashed, folder, ranks.rank))

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


def _do_nothing() -> None:
    pass


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
