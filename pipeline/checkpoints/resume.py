"""Which checkpoint a start begins with: all ranks hash a share of it, and agree."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from data.storage import Storage
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.manifest import rank_name
from pipeline.checkpoints.store import CheckpointStore
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError

_DOWNLOADS = ".downloads"


def open_whole(
    location: str | Path, ranks: Ranks, storage: Storage | None = None, scratch: Path | None = None
) -> Checkpoint:
    """The checkpoint at `location` with every file's checksum verified, each rank hashing a share.

    A remote one is downloaded to `scratch`, by default a temporary folder, as far as it is needed; `close` removes it.

    Raises:
        ConfigError: damaged, as found by any rank; the same on all.
        StorageDown, StorageRefused: a remote place that cannot be read.
    """
    damage = None
    try:
        own = scratch / _DOWNLOADS / rank_name(ranks.rank) if scratch else None
        checkpoint = open_checkpoint(location, storage, own)
        damage = checkpoint.damage(ranks.rank, ranks.world_size)
    except (ConfigError, OSError) as error:
        damage = str(error)
    found = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    found[ranks.rank] = damage is not None
    ranks_with_damage = ranks.sum(found).nonzero().flatten().tolist()
    if ranks_with_damage:
        reason = ranks.broadcast_text(ranks_with_damage[0], damage or "")
        raise ConfigError(f"{location}: damaged: {reason}; restore it from a copy")
    return checkpoint


def newest_whole(
    places: Sequence[CheckpointStore], ranks: Ranks, *, before: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file has its checksum, and why newer ones were passed over.

    With `before`, of those of fewer steps.

    None if there is none at all. Those passed over are set aside: they must not stand in the way of new ones, nor count
    as kept. Of `places`, the first is that of the recipe, and others may be known to the leader alone.

    Raises:
        ConfigError: there are checkpoints, and none is whole.
        StorageDown, StorageRefused: a remote place that cannot be read.
    """
    found: list[tuple[int, CheckpointStore]] = []
    if ranks.is_leader:
        shutil.rmtree(places[0].scratch / _DOWNLOADS, ignore_errors=True)  # of a start that was killed
        found = [
            (step, place) for place in places for step in place.contents().steps if before is None or step < before
        ]
        found.sort(key=lambda candidate: candidate[0], reverse=True)
    damaged: list[tuple[int, CheckpointStore]] = []
    reasons: list[str] = []
    # One listing for all: a network file system may show ranks different ones.
    for number in range(ranks.broadcast(len(found))):
        location = ranks.broadcast_text(0, found[number][1].at(found[number][0]) if ranks.is_leader else "")
        try:
            checkpoint = open_whole(location, ranks, places[0].storage, places[0].scratch)
        except ConfigError as error:
            damaged += found[number : number + 1]
            reasons.append(str(error))
            continue
        ranks.barrier()
        for step, place in damaged:
            place.set_aside(step)
        return checkpoint, reasons
    if reasons:
        raise ConfigError(
            f"{places[0].location}: none of its {len(reasons)} checkpoints is whole ({reasons[0]}); "
            "restore one, or remove the folder to begin anew"
        )
    return None, []
