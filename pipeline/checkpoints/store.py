"""Where the checkpoints of a stage lie: the run folder, another folder, or an object store. Needs no torch.

step-00012000/                    published
.step-00012000.<attempt>.writing/ being written; in an object store: a folder without a manifest
damaged-step-00011000/            set aside; in an object store: a folder with damaged-manifest.json
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.atomic_file import write_atomically
from data.storage import Storage, check_writable, is_remote, join, list_files, read_bytes, remove, write_bytes
from pipeline.checkpoints.manifest import MANIFEST, step_name, step_of
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage
from pipeline.recipe.sections import CheckpointSettings
from pipeline.run_folder import RunFolder

DAMAGED = "damaged-"
WRITING = ".writing"
_REMEMBERED = ".checkpoints.json"  # in the run folder


@dataclass(frozen=True, slots=True)
class Contents:
    """What lies at a place, as step -> file name -> bytes; of unfinished and damaged ones by folder name."""

    published: dict[int, dict[str, int]]
    unfinished: dict[str, dict[str, int]]
    damaged: dict[str, dict[str, int]]

    @property
    def steps(self) -> list[int]:
        """Steps of the published ones, newest first."""
        return sorted(self.published, reverse=True)


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one stage.

    Args:
        location: folder or URL.
        storage: how a URL is reached.
        scratch: folder of this machine in which files lie on their way to and from a remote place.
    """

    location: str
    storage: Storage
    scratch: Path

    @property
    def remote(self) -> bool:
        return is_remote(self.location)

    def at(self, step: int) -> str:
        """Where the checkpoint of `step` lies."""
        return join(self.location, step_name(step))

    def contents(self) -> Contents:
        """What lies there now.

        Raises:
            StorageDown, StorageRefused: a remote place that cannot be read.
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

    def remove(self, step: int, moved: Callable[[], None] = lambda: None) -> None:
        """Remove the checkpoint of `step`; `moved` is called along the way."""
        if self.remote:
            # Without its manifest it is no checkpoint any more, however the removal ends.
            remove(join(self.at(step), MANIFEST), self.storage)
            self.empty(step_name(step), moved)
        else:
            # Killed half way, it leaves what the next save sweeps away, and nothing that looks like a checkpoint.
            name = f".{step_name(step)}.removed{WRITING}"
            shutil.rmtree(Path(self.location) / name, ignore_errors=True)
            Path(self.at(step)).rename(Path(self.location) / name)
            self.empty(name, moved)

    def empty(self, name: str, moved: Callable[[], None] = lambda: None) -> None:
        """Remove the folder `name` and what is in it; `moved` is called along the way."""
        folder = join(self.location, name)
        if self.remote:
            for file in _remote_files(folder, self.storage):
                remove(join(folder, file), self.storage)
                moved()
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, step: int) -> None:
        """Take the checkpoint of `step`, which is damaged, out of the way of new ones; its files stay."""
        if self.remote:
            manifest = join(self.at(step), MANIFEST)
            write_bytes(join(self.at(step), DAMAGED + MANIFEST), read_bytes(manifest, self.storage), self.storage)
            remove(manifest, self.storage)
            return
        aside = Path(self.location) / (DAMAGED + step_name(step))
        shutil.rmtree(aside, ignore_errors=True)
        Path(self.at(step)).rename(aside)

    def check(self) -> None:
        """Make the folder, and see that it can be written.

        Raises:
            ConfigError: it cannot.
            StorageDown, StorageRefused: a remote place.
        """
        try:
            check_writable(self.location, self.storage)
        except (OSError, NotImplementedError) as error:
            if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise ConfigError(
                    f"checkpoint.folder: {self.location} cannot be written ({error}); use a place that can"
                ) from None

    def sweep_scratch(self, but: tuple[str, ...] = ()) -> None:
        """Remove what saves that did not end have left on this machine, except what begins like one of `but`."""
        for home in {self.scratch} if self.remote else {self.scratch, Path(self.location)}:
            for folder in home.glob(f".step-*{WRITING}"):
                if not folder.name.startswith(but):
                    shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, but: tuple[int, str] | None = None) -> None:
        """Remove what saves that did not end have left, except that of a step and attempt that goes on."""
        spared = (writing_name(*but), step_name(but[0])) if but else ()
        self.sweep_scratch(spared)
        for name in self.contents().unfinished if self.remote else ():
            if not name.startswith(spared):
                self.empty(name)


def writing_name(step: int, attempt: str) -> str:
    """What the folders begin with in which this machine has the unfinished files of a save."""
    return f".{step_name(step)}.{attempt}"


def checkpoint_store(folder: RunFolder, stage: TrainStage) -> CheckpointStore:
    """Where the run in `folder` keeps its checkpoints: there, or below `checkpoint.folder`."""
    return store_below(folder, stage.checkpoint.folder, Storage(**stage.data.storage.model_dump()))


def store_below(folder: RunFolder, below: str | None, storage: Storage) -> CheckpointStore:
    """Where the run in `folder` keeps its checkpoints: there, or `below` a path or URL."""
    location = join(below, f"{folder.path.parent.name}/{folder.path.name}") if below else str(folder.checkpoints)
    return CheckpointStore(location, storage, folder.checkpoints)


def known_stores(folder: RunFolder, place: CheckpointStore) -> list[CheckpointStore]:
    """`place`, and those that earlier starts of the run in `folder` used before the setting was changed."""
    others = [str(folder.checkpoints), *remembered(folder).get("places", [])]
    return [replace(place, location=location) for location in dict.fromkeys([place.location, *others])]


def remember(folder: RunFolder, place: CheckpointStore, settings: CheckpointSettings) -> None:
    """Write into the run folder where its checkpoints lie, how that is reached, and which of them are kept."""
    places = dict.fromkeys([*remembered(folder).get("places", []), place.location])
    kept = {name: getattr(settings, name) for name in ("keep_last", "keep_every", "keep_best")}
    content = {"places": list(places), "storage": asdict(place.storage), **kept}
    write_atomically(folder.path / _REMEMBERED, json.dumps(content))


def remembered(folder: RunFolder) -> dict[str, Any]:
    """What `remember` wrote; empty before the first start."""
    try:
        content: dict[str, Any] = json.loads((folder.path / _REMEMBERED).read_text())
    except (OSError, ValueError):
        return {}
    return content


def _local_folders(folder: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed or renamed a moment ago
            files = list(path.iterdir())
            found[path.name] = {}
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    found[path.name][file.name] = file.stat().st_size
    return found


def _remote_folders(place: CheckpointStore) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, size in _remote_files(place.location, place.storage).items():
        name, slash, file = path.partition("/")
        if slash:
            found.setdefault(name, {})[file] = size
    return found


def _remote_files(folder: str, storage: Storage) -> dict[str, int]:
    try:
        return list_files(folder, storage, below=True)
    except FileNotFoundError:
        return {}
