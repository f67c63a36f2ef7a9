"""What the same command does after a stage has ended early. Messages promise no checkpoint that is not there."""

from pathlib import Path

from data.errors import CoatnetError
from data.remote.storage import is_remote
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.manifest import MANIFEST, step_name, step_of
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import identity_of

STARTS_STAGE_OVER = "nothing of this stage has been saved, so the same command starts it over"


def if_repeated(folder: RunFolder) -> str:
    """That the same command continues from the newest checkpoint of the run in `folder`, by name, or
    `STARTS_STAGE_OVER`.

    It reads no remote store, which may not answer when a process must end: the event log counts for these.
    """
    try:
        newest = _newest(folder)
    except (OSError, CoatnetError):
        newest = None
    return STARTS_STAGE_OVER if newest is None else f"the same command continues from {step_name(newest)}"


def _newest(folder: RunFolder) -> int | None:
    """The step of the newest checkpoint, if there is one."""
    record, identity = CheckpointLocations.load(folder), identity_of(folder.path)
    own = record.locations if record and record.run == (identity.id if identity else None) else ()
    saved = folder.events.of(Event.SAVE) if any(map(is_remote, own)) else []
    places = [folder.checkpoints, *(Path(place) for place in own if not is_remote(place))]
    found = [step_of(file.parent.name) for place in places for file in place.glob(f"step-*/{MANIFEST}")]
    steps = [step for step in found if step is not None]
    return max([*steps, *(event.step for event in saved[-1:])], default=None)
