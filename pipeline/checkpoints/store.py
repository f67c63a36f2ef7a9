"""Where the checkpoints of a stage are stored: the run folder, another folder, or an object store. Needs no torch.

step-00012000/                    published
.step-00012000.<attempt>.writing/ being written; in an object store: a folder without a manifest
damaged-step-00011000/            set aside; in an object store: a folder with damaged-manifest.json
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.errors import CoatnetError, StorageDown, may_pass
from data.files.concurrent_calls import call_concurrently
from data.files.file_sizes import statuses
from data.remote.storage import (
    CONCURRENT_QUESTIONS,
    Storage,
    check_writable,
    is_remote,
    join,
    list_files,
    read_bytes,
    remove,
    write_bytes,
)
from pipeline.checkpoints.manifest import MANIFEST, step_name, step_of
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage
from pipeline.runs.run_folder import RunFolder

DAMAGED = "damaged-"
WRITING = ".writing"


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a store, as step -> file name -> bytes; unfinished and damaged checkpoints by folder name."""

    published: dict[int, dict[str, int]]
    unfinished: dict[str, dict[str, int]]
    damaged: dict[str, dict[str, int]]

    @property
    def steps(self) -> list[int]:
        """Steps of the published checkpoints, newest first."""
        return sorted(self.published, reverse=True)


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one stage.

    Args:
        location: folder or URL.
        storage: how a URL is reached.
        scratch: local folder for files on their way to and from a remote store.
    """

    location: str
    storage: Storage
    scratch: Path

    @property
    def remote(self) -> bool:
        return is_remote(self.location)

    def at(self, step: int) -> str:
        """Path or URL of the checkpoint of `step`."""
        return join(self.location, step_name(step))

    def contents(self) -> Contents:
        """What it holds now.

        Raises:
            StorageDown, StorageRefused: a remote store that cannot be read.
        """
        contents = Contents({}, {}, {})
        for name, files in (_remote_folders(self) if self.remote else _local_folders(Path(self.location))).items():
            step = step_of(name)
            if name.startswith(DAMAGED) or DAMAGED + MANIFEST in files:
                contents.damaged[name] = files
            elif step is None:
                if name.endswith(WRITING):
                    contents.unfinished[name] = files
            elif self.remote and MANIFEST not in files:
                contents.unfinished[name] = files
            else:
                contents.published[step] = files
        return contents

    def remove(self, step: int, on_progress: Callable[[], None] = lambda: None) -> None:
        """Remove the checkpoint of `step`; calls `on_progress` after each file."""
        if self.remote:
            # Without its manifest it is no longer a checkpoint, however the removal ends.
            remove(join(self.at(step), MANIFEST), self.storage)
            self.empty(step_name(step), on_progress)
        else:
            # If this is killed half way, the next save sweeps up the rest, and nothing looks like a checkpoint.
            name = f".{step_name(step)}.removed{WRITING}"
            shutil.rmtree(Path(self.location) / name, ignore_errors=True)
            Path(self.at(step)).rename(Path(self.location) / name)
            self.empty(name, on_progress)

    def empty(self, name: str, on_progress: Callable[[], None] = lambda: None) -> None:
        """Remove the folder `name` and what is in it; calls `on_progress` after each file."""
        folder = join(self.location, name)
        if self.remote:

            def remove_one(file: str) -> None:
                remove(join(folder, file), self.storage)
                on_progress()

            call_concurrently(remove_one, _remote_files(folder, self.storage), CONCURRENT_QUESTIONS)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, step: int) -> None:
        """Rename the checkpoint of `step`, which is damaged, so that it does not block new ones; its files stay."""
        if self.remote:
            manifest = join(self.at(step), MANIFEST)
            write_bytes(join(self.at(step), DAMAGED + MANIFEST), read_bytes(manifest, self.storage), self.storage)
            remove(manifest, self.storage)
            return
        aside = Path(self.location) / (DAMAGED + step_name(step))
        shutil.rmtree(aside, ignore_errors=True)
        Path(self.at(step)).rename(aside)

    def check(self) -> None:
        """Create the folder, and make sure that it can be written.

        Raises:
            ConfigError: it cannot.
            StorageDown: its file system or server fails.
            StorageRefused: a remote store.
        """
        try:
            check_writable(self.location, self.storage)
        except (OSError, NotImplementedError) as error:
            if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self.cannot_be_written(error) from None

    def cannot_be_written(self, error: Exception) -> CoatnetError:
        """The error for a place that cannot be written: another one has to be set, or this one may work later."""
        if may_pass(error):
            return StorageDown(f"{self.location} cannot be written ({error}); its file system or server fails")
        return ConfigError(f"checkpoint.folder: {self.location} cannot be written ({error}); set one that can")

    def create(self) -> None:
        """Create the folder; object stores have none."""
        if not self.remote:
            Path(self.location).mkdir(parents=True, exist_ok=True)

    def sweep_scratch(self, spared: tuple[str, ...] = ()) -> None:
        """Remove what unfinished saves left on this machine, except names that begin with one of `spared`."""
        for home in {self.scratch} if self.remote else {self.scratch, Path(self.location)}:
            for folder in home.glob(f".step-*{WRITING}"):
                if not folder.name.startswith(spared):
                    shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, in_flight: tuple[int, str] | None = None) -> None:
        """Remove what unfinished saves left, except that of the step and attempt `in_flight`."""
        spared = (writing_name(*in_flight), step_name(in_flight[0])) if in_flight else ()
        self.sweep_scratch(spared)
        for name in self.contents().unfinished if self.remote else ():
            if not name.startswith(spared):
                self.empty(name)


def writing_name(step: int, attempt: str) -> str:
    """What the names of the folders with the unfinished files of a save begin with."""
    return f".{step_name(step)}.{attempt}"


def checkpoint_store(folder: RunFolder, stage: TrainStage) -> CheckpointStore:
    """Where the run in `folder` keeps its checkpoints: in it, or below `checkpoint.folder`."""
    return store_below(folder, stage.checkpoint.folder, Storage(**stage.data.storage.model_dump()))


def store_below(folder: RunFolder, below: str | None, storage: Storage) -> CheckpointStore:
    """Where the run in `folder` keeps its checkpoints: in it, or `below` a path or URL."""
    location = join(below, f"{folder.path.parent.name}/{folder.path.name}") if below else str(folder.checkpoints)
    return CheckpointStore(location, storage, folder.checkpoints)


def is_own(store: CheckpointStore, folder: RunFolder) -> bool:
    """Whether the store is in the run folder itself, and moves and is copied with it."""
    return store.location == str(folder.checkpoints)


def _local_folders(folder: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed or renamed a moment ago
            files = sorted(os.listdir(path))
            looks = zip(files, statuses(str(path), files), strict=True)
            found[path.name] = {name: status.st_size for name, status in looks if status is not None}
    return found


def _remote_folders(store: CheckpointStore) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, size in _remote_files(store.location, store.storage).items():
        name, slash, file = path.partition("/")
        if slash:
            found.setdefault(name, {})[file] = size
    return found


def _remote_files(folder: str, storage: Storage) -> dict[str, int]:
    try:
        return list_files(folder, storage, below=True)
    except FileNotFoundError:
        return {}
