"""Checkpoints of a run that may go on, and then removes old ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.remote.storage import Storage, is_remote
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.resume import open_verified
from pipeline.errors import CheckpointRemoved, ConfigError
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.stage_settings import is_checkpoint_of

REMOVED = "removed since this command began, as the run has saved newer ones"


@contextmanager
def run_checkpoint(location: str, plan: TrainPlan, ranks: Ranks, scratch: Path) -> Iterator[Checkpoint]:
    """The checkpoint at `location` after every file's checksum was verified, on all ranks; closed afterwards.

    Args:
        location: path or URL.
        plan: of the whole stage.
        ranks: all of them.
        scratch: folder for downloads.

    Raises:
        ConfigError: it is damaged, or of another recipe or other data.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    checkpoint = open_verified(location, ranks, Storage(**plan.stage.data.storage.model_dump()), scratch)
    try:
        if not is_checkpoint_of(plan, checkpoint.manifest.facts):
            raise ConfigError(f"{checkpoint.location}: a checkpoint of another recipe or of other data")
        yield checkpoint
    finally:
        checkpoint.close()


@contextmanager
def naming_removal(location: str | None) -> Iterator[None]:
    """Inside, a file of the checkpoint at `location` that is missing is said to be what it is.

    Raises:
        CheckpointRemoved: the run has removed the checkpoint.
    """
    try:
        yield
    except FileNotFoundError:
        if not is_removed(location):
            raise
        raise CheckpointRemoved(f"{location}: {REMOVED}") from None


def is_removed(location: str | None) -> bool:
    """Whether a checkpoint on a file system is gone; False for no checkpoint, and for one in a remote store."""
    return location is not None and not is_remote(location) and not Path(location).exists()
