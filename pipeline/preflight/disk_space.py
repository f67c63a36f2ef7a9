"""Whether there is space for the checkpoints and the remote shards that a stage keeps, and whether their folders can be
written.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.remote.cache import Cache
from data.remote.storage import check_writable
from models.complexity import count_parameters
from pipeline.checkpoints.store import CheckpointStore, checkpoint_store
from pipeline.errors import ConfigError
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.run_folder import run_folder
from pipeline.state_bytes import checkpoint_bytes

_CLOCKS_APART = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class SpaceNeed:
    """Disk space for the checkpoints of a stage."""

    stage: str
    checkpoint_bytes: int
    """Of one checkpoint."""
    peak: int
    """Most checkpoints stored at a time, including the one being written."""
    early_peak: int
    """The same without those that `keep_every` accumulates over the stage."""
    stored_bytes: int = 0
    """Of the checkpoints stored now."""

    def missing_bytes(self, checkpoints: int) -> int:
        """Bytes yet to be written until `checkpoints` are stored."""
        return max(0, self.checkpoint_bytes * checkpoints - self.stored_bytes)


def most_kept(stage: TrainStage, steps: int | None) -> tuple[int, int]:
    """Most checkpoints stored at a time in `steps` steps: those that retention keeps, that of the last stop, and the
    one being written; and the same without those that `keep_every` keeps. If the steps are not known, both are without.
    """
    settings = stage.checkpoint
    early = settings.keep_last + settings.keep_best + 2
    if steps is None:
        return early, early
    saves, accumulated = -(-steps // settings.interval) + 1, 0
    if settings.keep_every:
        accumulated = steps // math.lcm(settings.keep_every, settings.interval)
    return min(early + accumulated, saves), min(early, saves)


def assess_disk_space(
    recipe: Recipe, stages: Sequence[tuple[str, TrainStage, int, int | None]], caches: Collection[Cache] = ()
) -> list[Finding]:
    """Space and permissions for the checkpoints of stages, given as name, stage, number of classes, and steps if known.

    Stages whose checkpoints share a disk are added up, since the checkpoints of one are kept while the next runs.
    `caches` are those of remote shards on this machine, which may fill the same disks.
    """
    found: list[Finding] = []
    on_disk: dict[int, list[tuple[SpaceNeed, Path]]] = {}
    for name, stage, classes, steps in stages:
        store = checkpoint_store(run_folder(recipe, name), stage)
        parameters = count_parameters(stage.model.variant, stage.resolution, classes)
        need = SpaceNeed(name, checkpoint_bytes(stage, parameters), *most_kept(stage, steps))
        if store.remote:
            found.append(_assess_remote(store, need))
            continue
        home = existing_parent(Path(store.location))
        unwritable = assess_writable(name, home)
        if unwritable is not None:
            found.append(unwritable)
            continue
        stored = sum(sum(files.values()) for files in store.contents().published.values())
        on_disk.setdefault(home.stat().st_dev, []).append((replace(need, stored_bytes=stored), home))
    for needs in on_disk.values():
        home = needs[0][1]
        growth = {cache.folder: _growth(cache) for cache in caches if _on_disk(cache, home)}
        found.append(_assess_disk([need for need, _ in needs], home, sum(growth.values())))
    return found


def assess_writable(stage: str, home: Path) -> Finding | None:
    """The finding if the folder `home`, where checkpoints of `stage` are to be created, cannot be written."""
    try:
        probe_writing(home)
    except OSError as error:
        what = f"checkpoints: {home} cannot be written ({error.strerror})"
        return Finding("error", stage, what, "set runs or checkpoint.folder to a folder that you can write")
    return None


def assess_cache_space(stage: str, cache: Cache, need: int) -> Finding:
    """Whether the disk of `cache` has room for the `need` bytes of shards that a node reads at a time."""
    used = (cache.folder / "requests").is_dir()
    home = existing_parent(cache.folder)
    room = cache.room_for_another_run() if used else replace(cache, folder=home).disk_room(0)
    what = f"data.cache.folder: {cache.folder} has room for {gigabytes(max(0, room))} of shards beside what others read"
    if room < need:
        fix = "use another disk, or reduce data.shuffle_window"
        return Finding("error", stage, f"{what}, and a node reads {gigabytes(need)} at a time", fix)
    return Finding("ok", stage, what)


def _on_disk(cache: Cache, home: Path) -> bool:
    return existing_parent(cache.folder).stat().st_dev == home.stat().st_dev


def _growth(cache: Cache) -> int:
    """Bytes by which a cache may grow if the disk allows it."""
    return max(0, cache.bytes - (cache.used_bytes() if (cache.folder / "shards").is_dir() else 0))


def _assess_disk(needs: Sequence[SpaceNeed], home: Path, cache_growth: int) -> Finding:
    free, missing = shutil.disk_usage(home).free, sum(need.missing_bytes(need.peak) for need in needs)
    each = ", ".join(f"{need.stage} {need.peak} of {gigabytes(need.checkpoint_bytes)}" for need in needs)
    what = f"checkpoints: at most {each}; {gigabytes(missing)} more, and {home} has {gigabytes(free)} free"
    where = needs[0].stage if len(needs) == 1 else ""
    if missing > free:
        full_early = sum(need.missing_bytes(need.early_peak) for need in needs) > free
        fix = "keep fewer (checkpoint.keep_last, keep_every, keep_best), or set checkpoint.folder to a larger disk"
        return Finding("error" if full_early else "warning", where, what, fix)
    if missing + cache_growth > free:
        what = f"{what}, which the cache of remote shards on the same disk may fill"
        fix = f"reduce data.cache.gigabytes by {math.ceil((missing + cache_growth - free) / 1e8) / 10:g}"
        return Finding("warning", where, what, f"{fix}, or set data.cache.folder to another disk")
    return Finding("ok", where, what)


def _assess_remote(store: CheckpointStore, need: SpaceNeed) -> Finding:
    try:
        check_writable(store.location, store.storage)
    except Exception as error:
        if isinstance(error, OSError | NotImplementedError):
            error = ConfigError(f"{store.location} cannot be written ({error}); use a place that can be written")
        return finding_of_error(need.stage, error)
    what = f"checkpoints: {store.location} can be written; at most {need.peak} of {gigabytes(need.checkpoint_bytes)}"
    return Finding("ok", need.stage, what)


def assess_clock(recipe: Recipe) -> Finding | None:
    """Compare this machine's clock with the file server's of the run folders; None if these cannot be written."""
    home = existing_parent(Path(recipe.runs))
    try:
        before = time.time()
        stamp = probe_writing(home)
        after = time.time()
    except OSError:
        return None
    difference = max(before - stamp, stamp - after, 0.0)
    return clock_finding(f"the file server of {home}", difference)


def clock_finding(whose: str, seconds: float) -> Finding:
    """The finding on a clock that differs from this machine's by `seconds`."""
    what = f"clock: {whose} and this machine differ by {seconds:.0f} s"
    if seconds > _CLOCKS_APART:
        return Finding("warning", "", what, "synchronize them (chrony, ntpd): time limits and curves depend on them")
    return Finding("ok", "", f"clock: {whose} agrees with this machine's")


def probe_writing(folder: Path) -> float:
    """Write a file into `folder` and remove it; returns its modification time, by the file server's clock.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
        file.write(b"?")
        file.flush()
        os.fsync(file.fileno())
        return os.stat(file.name).st_mtime


def existing_parent(path: Path) -> Path:
    """`path` if it is a folder, or else its nearest parent that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def gigabytes(size: int) -> str:
    """A size for a message."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
