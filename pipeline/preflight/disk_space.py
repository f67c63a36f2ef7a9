"""Whether the checkpoints that will be kept have room where they go, and whether that place can be written."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.storage import check_writable
from models.complexity import count_parameters
from pipeline.checkpoints.store import CheckpointStore, checkpoint_store
from pipeline.errors import ConfigError
from pipeline.memory_estimate import checkpoint_bytes
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.run_folder import run_folder

_SLOW_CLOCK = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Need:
    """What the checkpoints of a stage take."""

    stage: str
    each: int
    """Bytes of one."""
    most: int
    """That lie there at a time, with one being written."""
    soon: int
    """The same, but for those that `keep_every` piles up over the stage."""
    held: int = 0
    """Bytes that lie there now."""

    def more(self, checkpoints: int) -> int:
        """Bytes that are still to come until so many lie there."""
        return max(0, self.each * checkpoints - self.held)


def most_kept(stage: TrainStage, steps: int | None) -> tuple[int, int]:
    """Most checkpoints that lie there at a time in `steps` steps: what retention keeps, and the one being written; and
    the same without those that `keep_every` keeps, which are not counted either where the steps are not known.
    """
    settings = stage.checkpoint
    soon = settings.keep_last + settings.keep_best + 1
    if steps is None:
        return soon, soon
    saves, piled = -(-steps // settings.every_steps), 0
    if settings.keep_every:
        piled = steps // math.lcm(settings.keep_every, settings.every_steps)
    return min(soon + piled, saves), min(soon, saves)


def assess_disk_space(recipe: Recipe, stages: Sequence[tuple[str, TrainStage, int, int | None]]) -> list[Finding]:
    """Room and rights for the checkpoints of stages with their classes and, where known, their steps.

    Stages whose checkpoints share a disk are counted together, since those of one stay when the next runs.
    """
    found: list[Finding] = []
    on_disk: dict[int, list[tuple[Need, Path]]] = {}
    for name, stage, classes, steps in stages:
        place = checkpoint_store(run_folder(recipe, name), stage)
        parameters = count_parameters(stage.model.variant, stage.resolution, classes)
        need = Need(name, checkpoint_bytes(stage, parameters), *most_kept(stage, steps))
        if place.remote:
            found.append(_examine_remote(place, need))
            continue
        home = existing_parent(Path(place.location))
        try:
            probe_writing(home)
        except OSError as error:
            what = f"checkpoints: {home} cannot be written ({error.strerror})"
            found.append(Finding("error", name, what, "set runs or checkpoint.folder to a folder that you can write"))
            continue
        held = sum(sum(files.values()) for files in place.contents().published.values())
        on_disk.setdefault(home.stat().st_dev, []).append((replace(need, held=held), home))
    for needs in on_disk.values():
        found.append(_examine_disk([need for need, _ in needs], needs[0][1]))
    return found


def _examine_disk(needs: Sequence[Need], home: Path) -> Finding:
    free, more = shutil.disk_usage(home).free, sum(need.more(need.most) for need in needs)
    each = ", ".join(f"{need.stage} {need.most} of {gigabytes(need.each)}" for need in needs)
    what = f"checkpoints: at most {each}; {gigabytes(more)} more, and {home} has {gigabytes(free)} free"
    where = needs[0].stage if len(needs) == 1 else ""
    if more > free:
        full_soon = sum(need.more(need.soon) for need in needs) > free
        fix = "keep fewer (checkpoint.keep_last, keep_every, keep_best), or set checkpoint.folder to a place with room"
        return Finding("error" if full_soon else "warning", where, what, fix)
    return Finding("ok", where, what)


def _examine_remote(place: CheckpointStore, need: Need) -> Finding:
    try:
        check_writable(place.location, place.storage)
    except Exception as error:
        if isinstance(error, OSError | NotImplementedError):
            error = ConfigError(f"{place.location} cannot be written ({error}); use a place that can")
        return finding_of_error(need.stage, error)
    what = f"checkpoints: {place.location} can be written; at most {need.most} of {gigabytes(need.each)}"
    return Finding("ok", need.stage, what)


def assess_clock(recipe: Recipe) -> Finding | None:
    """This machine's clock against that of the file server of the run folders; None where these cannot be written."""
    home = existing_parent(Path(recipe.runs))
    try:
        before = time.time()
        stamp = probe_writing(home)
        after = time.time()
    except OSError:
        return None
    late = max(before - stamp, stamp - after, 0.0)
    return clock_finding(f"the file server of {home}", late)


def clock_finding(whose: str, seconds: float) -> Finding:
    """What to think of a clock that is off by `seconds`."""
    what = f"clock: {whose} and this machine differ by {seconds:.0f} s"
    if seconds > _SLOW_CLOCK:
        return Finding("warning", "", what, "have them synchronized (chrony, ntpd): time limits and curves go by them")
    return Finding("ok", "", f"clock: {whose} agrees with this machine's")


def probe_writing(folder: Path) -> float:
    """Write a file into `folder` and remove it; returns the time that the file server gave it.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
        file.write(b"?")
        file.flush()
        os.fsync(file.fileno())
        return os.stat(file.name).st_mtime


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    while not path.is_dir():
        path = path.parent
    return path


def gigabytes(size: int) -> str:
    """A size for a person."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
