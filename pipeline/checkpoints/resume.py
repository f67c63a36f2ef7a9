"""Which checkpoint a start begins with: all ranks hash a share of it, and agree."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.errors import raise_if_passing
from data.remote.storage import Storage
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.manifest import rank_name
from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.verification import reason_at
from pipeline.errors import ConfigError
from pipeline.ranks.distributed import Ranks

_DOWNLOADS = ".downloads"


def open_verified(
    location: str | Path, ranks: Ranks, storage: Storage | None = None, scratch: Path | None = None
) -> Checkpoint:
    """The checkpoint at `location` after every file's checksum was verified, each rank hashing a share.

    What is needed of a remote one is downloaded to `scratch`, by default a temporary folder; `close` removes it.

    Raises:
        ConfigError: damaged, as found by any rank; the same on all.
        OSError: a file system that fails for a while, see `may_pass`.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    damage = None
    try:
        own = scratch / _DOWNLOADS / rank_name(ranks.rank) if scratch else None
        checkpoint = open_checkpoint(location, storage, own)
        damage = checkpoint.damage(ranks.rank, ranks.world_size)
    except (ConfigError, OSError) as error:
        raise_if_passing(error)
        damage = reason_at(str(location), error)
    found = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    found[ranks.rank] = damage is not None
    ranks_with_damage = ranks.sum(found).nonzero().flatten().tolist()
    if ranks_with_damage:
        reason = ranks.broadcast_text(ranks_with_damage[0], damage or "")
        raise ConfigError(f"{location}: damaged: {reason}; restore it from a copy")
    return checkpoint


def newest_intact(
    stores: Sequence[CheckpointStore],
    ranks: Ranks,
    *,
    accepts: Callable[[int], bool] = lambda step: True,
    for_stops: bool = True,
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files all have their checksums, and why newer ones were passed over.

    None if there are no checkpoints at all. Those passed over are set aside: they must neither block new ones nor count
    as kept.

    Args:
        stores: to search. The first is that of the recipe; only the leader needs to know the others.
        ranks: of the run.
        accepts: whether the checkpoint after so many steps is considered.
        for_stops: whether those that were saved because a start was stopped are.

    Raises:
        ConfigError: there are checkpoints, and none is intact.
        OSError: a file system that fails for a while, see `may_pass`.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    found: list[tuple[int, CheckpointStore]] = []
    if ranks.is_leader:
        shutil.rmtree(stores[0].scratch / _DOWNLOADS, ignore_errors=True)  # left by a start that was killed
        found = [(step, store) for store in stores for step in store.contents().steps if accepts(step)]
        found.sort(key=lambda candidate: candidate[0], reverse=True)
    damaged: list[tuple[int, CheckpointStore]] = []
    reasons: list[str] = []
    # The leader lists for all: a network file system may show ranks different contents.
    for number in range(ranks.broadcast(len(found))):
        location = ranks.broadcast_text(0, found[number][1].at(found[number][0]) if ranks.is_leader else "")
        try:
            checkpoint = open_verified(location, ranks, stores[0].storage, stores[0].scratch)
        except ConfigError as error:
            damaged += found[number : number + 1]
            reasons.append(str(error))
            continue
        if checkpoint.manifest.facts.for_stop and not for_stops:
            checkpoint.close()
            continue
        ranks.barrier()
        for step, store in damaged:
            store.set_aside(step)
        return checkpoint, reasons
    if reasons:
        raise ConfigError(
            f"{stores[0].location}: none of its {len(reasons)} checkpoints is intact ({reasons[0]}); "
            "restore one, or remove the folder to start over"
        )
    return None, []
