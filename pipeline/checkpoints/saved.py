"""What the same command does after a stage has ended early. Messages promise no checkpoint that is not there."""

from pathlib import Path

from data.errors import CoatnetError
from data.remote.storage import is_remote
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.errors import CONTINUES
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import identity_of

STARTS_STAGE_OVER = "nothing of this stage has been saved, so the same command starts it over"


def if_repeated(folder: RunFolder) -> str:
    """`CONTINUES` if the run in `folder` has a checkpoint, else `STARTS_STAGE_OVER`.

    It reads no remote store, which may not answer when a process must end: the event log counts for these.
    """
    try:
        return CONTINUES if _has_checkpoint(folder) else STARTS_STAGE_OVER
    except (OSError, CoatnetError):
        return STARTS_STAGE_OVER


def _has_checkpoint(folder: RunFolder) -> bool:
    record, identity = CheckpointLocations.load(folder), identity_of(folder.path)
    own = record.locations if record and record.run == (identity.id if identity else None) else ()
    if any(map(is_remote, own)) and folder.events.of(Event.SAVE):
        return True
    places = [folder.checkpoints, *(Path(place) for place in own if not is_remote(place))]
    return any(next(place.glob(f"step-*/{MANIFEST}"), None) for place in places)
