"""The folder of one stage of one run: everything that is known of it lies here, and restarts go by it.

runs/<recipe>/<stage>/  recipe.yaml  checkpoints/  tensorboard/  events.jsonl  logs/  progress.json  result.json
"""

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from data.atomic_file import write_atomically
from data.storage import Storage, is_remote, join, read_bytes
from pipeline.errors import ConfigError
from pipeline.event_log import EventLog

if TYPE_CHECKING:  # those who only look at a folder start in half the time without numpy and pydantic
    from pipeline.plan import Plan, TrainPlan
    from pipeline.recipe.schema import Recipe

# Settings that may change between restarts: they decide where and how fast the run is computed, and not what.
FREE_SETTINGS = (
    "data.train", "data.validation", "data.label_map", "data.validation_label_map",  # their digests count
    "data.storage", "data.cache", "data.workers", "data.skipped_share", "data.skipped_run",
    "zero_stage", "activation_checkpointing", "compile", "checkpoint", "evaluation", "non_finite", "log", "watchdog",
    "resources",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The run folder at `path`."""

    path: Path

    @property
    def _recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def events(self) -> EventLog:
        return EventLog(self.path / "events.jsonl")

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    def log_file(self, rank: int) -> Path:
        """The log of one rank."""
        return self.logs / f"rank-{rank:05d}.log"

    def check(self, plan: "Plan", start_digest: str | None) -> None:
        """Hold the stage's settings, data and starting weights against those of its first start, if there was one.

        Raises:
            ConfigError: the folder belongs to another run; names what differs.
        """
        if not self._recipe.exists():
            return
        before, now = _flat(yaml.safe_load(self._recipe.read_text())), _flat(_settings(plan, start_digest))
        changes = [
            f"  {key}: {_shown(before.get(key))} -> {_shown(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not _is_free(key)
        ]
        if changes:
            changed = "\n".join(changes)
            raise ConfigError(
                f"{self.path} holds a run with other settings:\n{changed}\n"
                "Restore them, give the recipe another name, or remove the folder to begin anew"
            )

    def create(self) -> None:
        """Make the folder and those in it.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            for folder in (self.checkpoints, self.tensorboard, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run folder {self.path}: {error.strerror}; set runs to a folder you can write") from None

    def freeze(self, plan: "Plan", start_digest: str | None) -> None:
        """Check the stage, and write down at its first start what `check` compares."""
        self.check(plan, start_digest)
        if not self._recipe.exists():
            write_atomically(self._recipe, yaml.safe_dump(_settings(plan, start_digest), sort_keys=False))

    def lock(self) -> FileLock:
        """Hold the folder for this process.

        Raises:
            ConfigError: another process runs this stage.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=10)
        except Timeout:
            raise ConfigError(f"{self.path}: another process is running this stage; wait for it or stop it") from None
        return lock

    def held(self) -> bool:
        """Whether a process that this machine can know of runs the stage. Writes nothing."""
        try:
            with open(self.path / ".lock", "rb") as lock:
                # Shared, and for no time: those who look do not see each other, and a start that waits does not notice.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no file, or a file system without locks
            return False
        return False

    def finish(self, result: dict[str, Any]) -> None:
        """Publish `result.json`: the stage is done."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=1) + "\n")
        self.events.record("finish")

    def result(self) -> dict[str, Any] | None:
        """What `finish` published, or None while the stage is not done."""
        try:
            content: dict[str, Any] = json.loads((self.path / "result.json").read_text())
        except FileNotFoundError:
            return None
        return content


def run_folder(recipe: "Recipe", stage: str) -> RunFolder:
    """The folder of a stage."""
    return RunFolder(Path(recipe.runs) / recipe.name / stage)


def final_checkpoint(recipe: "Recipe", stage: str) -> str:
    """Path or URL of the checkpoint that a finished training stage ended with.

    Raises:
        ConfigError: the stage is not done.
    """
    folder = run_folder(recipe, stage)
    result = folder.result()
    if result is None:
        raise ConfigError(f"stage {stage} is not done ({folder.path} has no result.json); run it first")
    return absolute_location(str(result["checkpoint"]), folder)


def absolute_location(checkpoint: str, folder: RunFolder) -> str:
    """Path or URL of a checkpoint that a `result.json` in `folder` names."""
    return checkpoint if is_remote(checkpoint) else str(folder.path.parent / checkpoint)


def relative_location(checkpoint: str, folder: RunFolder) -> str:
    """A checkpoint's place as `result.json` has it: from the recipe's folder if it lies below that, so that one can
    move it, and whole otherwise.
    """
    if not is_remote(checkpoint) and Path(checkpoint).is_relative_to(folder.path.parent):
        return str(Path(checkpoint).relative_to(folder.path.parent))
    return checkpoint


def start_digest(recipe: "Recipe", stage: str) -> str | None:
    """What tells the weights that a stage starts from from others: the sha256 of their checkpoint's manifest.

    None if it starts from none, or from a stage that is not done.

    Raises:
        ConfigError: the checkpoint is gone.
        StorageDown, StorageRefused: a remote one that cannot be read.
    """
    start = recipe.stages[stage].start_from
    if start is None or run_folder(recipe, start).result() is None:
        return None
    checkpoint = final_checkpoint(recipe, start)
    storage = Storage(**recipe.stages[stage].data.storage.model_dump())
    try:
        return hashlib.sha256(read_bytes(join(checkpoint, "manifest.json"), storage)).hexdigest()
    except FileNotFoundError:
        raise ConfigError(
            f"{checkpoint}: the checkpoint that stage {start} ended with is gone; restore it, or remove "
            f"{run_folder(recipe, start).path} to train that stage anew"
        ) from None


def digests(plan: "TrainPlan") -> dict[str, str]:
    """What tells a run from others in its checkpoints: of the settings that make it what it is, and of its data."""
    settings = {key: value for key, value in _flat(_settings(plan, None)).items() if not _is_free(key)}
    return {
        "recipe_digest": _digest(settings),
        "index_digest": plan.train.digest,
        "classes_digest": classes_digest(plan),
    }


def classes_digest(plan: "Plan") -> str:
    """What tells the classes, in their order, from others: a classifier fits no others, be they as many."""
    return _digest(plan.classes)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _settings(plan: "Plan", start_digest: str | None) -> dict[str, Any]:
    from pipeline.plan import TrainPlan

    digests = {"validation": plan.validation.digest}
    if isinstance(plan, TrainPlan):
        digests = {"train": plan.train.digest, **digests}
    stage = plan.stage.model_dump(mode="json")
    return {"stage": plan.name, "seed": plan.seed, **stage, "index_digests": digests, "start_digest": start_digest}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_SETTINGS)
