"""Where the checkpoints of a run are: in its folder, and in places that it has claimed. Needs no torch."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from data.errors import StorageRefused, raise_if_passing
from data.files.atomic_file import write_atomically
from data.files.json_records import check_at_least, parse_json, to_json
from data.files.regular_file import read_regular
from data.remote.storage import Storage
from pipeline.checkpoints.claim import read_claim
from pipeline.checkpoints.store import CheckpointStore, is_own
from pipeline.errors import ConfigError
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import identity_of

log = logging.getLogger(__name__)

_LOCATIONS = ".checkpoints.json"  # in the run folder


@dataclass(frozen=True, slots=True)
class CheckpointLocations:
    """What a run folder records of its checkpoints at every start: where else they are, and which of them are kept."""

    locations: tuple[str, ...]
    """Places outside of the run folder, of all starts, oldest first."""
    storage: Storage
    """How URLs among them are reached."""
    keep_last: int
    keep_every: int | None
    keep_best: int
    run: str | None = None
    """The id of the run that recorded it; that of another run if the folder is a copy."""

    def __post_init__(self) -> None:
        check_at_least(0, keep_last=self.keep_last, keep_every=self.keep_every or 0, keep_best=self.keep_best)

    @classmethod
    def load(cls, folder: RunFolder) -> "CheckpointLocations | None":
        """What the last start recorded; None before the first.

        Raises:
            ConfigError: the file is damaged.
        """
        path = folder.path / _LOCATIONS
        try:
            return parse_json(cls, read_regular(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise_if_passing(error)
            raise ConfigError(
                f"{path}: damaged ({error}); restore it from a copy, or remove it: checkpoints are then looked for in "
                "the run folder and in the checkpoint.folder of the recipe alone"
            ) from None

    @classmethod
    def save(cls, folder: RunFolder, store: CheckpointStore, settings: CheckpointSettings) -> None:
        """Record `store` as the newest location, and what is kept of it."""
        before, identity = cls.load(folder), identity_of(folder.path)
        run = identity.id if identity else None
        earlier = before.locations if before and before.run == run else ()
        others = dict.fromkeys([*earlier, *([] if is_own(store, folder) else [store.location])])
        kept = (settings.keep_last, settings.keep_every, settings.keep_best)
        record = cls(tuple(others), store.storage, *kept, run)
        write_atomically(folder.path / _LOCATIONS, json.dumps(to_json(record)))


def known_stores(
    folder: RunFolder, store: CheckpointStore, note: Callable[[str], None] = log.warning
) -> list[CheckpointStore]:
    """`store`, the run folder, and the places that earlier starts used before checkpoint.folder was changed.

    Places of other runs are left out, and `note` is called with a line about each: those of the run that this folder
    was copied from, and those that another run has claimed.

    Raises:
        ConfigError: a record of the run is damaged.
        StorageDown: it cannot be found out to whom `store` belongs.
    """
    record, identity = CheckpointLocations.load(folder), identity_of(folder.path)
    run = identity.id if identity else None
    claimed = record.locations if record and record.run == run else ()
    found = [store] if store.location in claimed or _may_be_read(store, folder, run, note) else []
    others = [str(folder.checkpoints), *claimed]
    found += [replace(store, location=place) for place in dict.fromkeys(others) if place != store.location]
    for place in record.locations if record and record.run != run else ():
        if place not in (store.location, str(folder.checkpoints)):
            note(f"{place}: passed over, since the run that this folder was copied from has its checkpoints there")
    return found


def _may_be_read(store: CheckpointStore, folder: RunFolder, run: str | None, note: Callable[[str], None]) -> bool:
    """Whether a place that this run has not used yet does not belong to another."""
    if is_own(store, folder):
        return True
    try:
        claim = read_claim(store)
    except (OSError, StorageRefused) as error:
        raise_if_passing(error)
        note(f"{store.location}: passed over, since it cannot be read ({error})")
        return False
    if claim is not None and claim.run != run:
        note(f"{store.location}: passed over, since another run, {claim.folder}, has its checkpoints there")
        return False
    return True
