"""The folder of one stage of one run: everything known about the stage is stored here, and restarts rely on it.

runs/<recipe>/<stage>/  recipe.yaml  checkpoints/  events.jsonl  logs/  progress.json  result.json  samples/
                        verified_shards/  events.out.tfevents.*  validation/events.out.tfevents.*
                        plan/events.out.tfevents.*  replays/
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from data.errors import raise_if_passing
from data.files.atomic_file import write_atomically
from data.files.file_lock import check_locks
from data.files.json_records import parse_json, to_json, to_record
from data.files.regular_file import open_regular, read_regular
from data.files.yaml_text import YamlError, load_plain_yaml, yaml_file
from data.remote.storage import Storage, is_remote
from data.remote.web_address import without_secrets
from data.settings_diff import changed_settings
from pipeline.checkpoints.manifest import json_object, manifest_bytes, weights_digest
from pipeline.errors import ConfigError
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.fixed_settings import why_fixed
from pipeline.runs.frozen_stage import FrozenStage
from pipeline.runs.run_access import cannot_be_written, check_writable, hold
from pipeline.runs.run_identity import identity_of
from pipeline.runs.settings_history import is_history
from pipeline.runs.stage_result import StageResult
from pipeline.runs.stage_settings import may_change, own_settings, stage_settings

if TYPE_CHECKING:  # commands that only look at a folder start in half the time without numpy and pydantic
    from pipeline.plan import Plan
    from pipeline.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The run folder at `path`."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files: this one, so that TensorBoard calls the run by recipe and stage."""
        return self.path

    @property
    def validation(self) -> Path:
        """The folder of the event files of evaluations: to TensorBoard another run, with a colour of its own."""
        return self.path / "validation"

    @property
    def plan(self) -> Path:
        """The folder of the event file with the planner's pictures, which no start of the run writes."""
        return self.path / "plan"

    @property
    def replays(self) -> Path:
        """The folder of the results of `coatnet replay` and `coatnet verify`, each in a folder of its own."""
        return self.path / "replays"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def verified_shards(self) -> Path:
        return self.path / "verified_shards"

    @property
    def events(self) -> EventLog:
        return EventLog(self.path / "events.jsonl")

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    def beside(self, stage: str) -> "RunFolder":
        """The folder of another stage of the same run."""
        return RunFolder(self.path.parent / stage)

    def log_file(self, rank: int) -> Path:
        """The log of one rank."""
        return self.logs / f"rank-{rank:05d}.log"

    def frozen(self) -> FrozenStage | None:
        """What `freeze` wrote, or an `Extension` since; None before the first start, or where another kind of recipe is
        in its place.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            content = load_plain_yaml(yaml_file(self.recipe), str(self.recipe))
            if not isinstance(content, dict):
                raise ValueError("empty or cut short" if content is None else "not a mapping")
            if "index_digests" not in content and "stages" in content:
                return None
            return to_record(FrozenStage, {**content, "content": content})
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise_if_passing(error)
            raise self.damaged_recipe(error) from None

    def damaged_recipe(self, error: Exception) -> ConfigError:
        """The error for a `recipe.yaml` that cannot be what `freeze` wrote."""
        reason = " ".join(str(error.problem if isinstance(error, YamlError) else error).split())
        return ConfigError(
            f"{self.recipe}: damaged ({reason}); restore it from a copy, or remove the run folder to start over"
        )

    def check(self, plan: "Plan", start_digest: str | None) -> None:
        """Compare the stage's settings, data and starting weights with those of its first start, if there was one.

        Raises:
            ConfigError: the folder belongs to another run, and what differs; or its recipe is damaged.
        """
        self._compare(stage_settings(plan, start_digest))

    def check_settings(self, recipe: "Recipe") -> None:
        """As `check`, for the settings of the stage alone, when its data cannot be read yet."""
        name = self.path.name
        own = own_settings(name, recipe.seed, recipe.stages[name])
        frozen = self.frozen() if self.recipe.exists() else None
        rest = {key: frozen.content.get(key) for key in ("index_digests", "start_digest")} if frozen else {}
        self._compare(own | rest)

    def _compare(self, now: Mapping[str, Any]) -> None:
        if not self.recipe.exists():
            if self.result() is not None:
                raise ConfigError(
                    f"{self.path}: has a result and no recipe.yaml, which says what it is the result of; restore that "
                    "file from a copy, or move the folder away to run the stage"
                )
            return
        frozen = self.frozen()
        if frozen is None:
            raise self.damaged_recipe(ValueError("not the record of a stage"))
        changes = changed_settings(frozen.content, now, lambda key: may_change(key) or is_history(key))
        if changes:
            source = now.get("start_from")
            if isinstance(source, str) and "/" in source and source == frozen.content.get("start_from"):
                replaced = f", since the weights at {source} were replaced"
                changes = [f"{line}{replaced if line.startswith('start_digest:') else ''}" for line in changes]
            changed = "\n  ".join(changes)
            whose = self.path.stat().st_uid
            fix = "Restore them, give the recipe another name, or remove the folder to start over"
            if whose != os.getuid():  # never advise removing what is somebody else's
                fix = f"The folder belongs to another user (uid {whose}): give the recipe another name, or set runs"
            fixed = next(filter(None, (why_fixed(change.partition(":")[0]) for change in changes)), None)
            if now.get("task") == "train" and frozen.task == "train":
                fix += f"; --extend cannot change this: {fixed}" if fixed else (
                    "; to go on from its last checkpoint with them, repeat the command with --extend"
                )  # fmt: skip
            raise ConfigError(f"{self.path} holds a run with other settings:\n  {changed}\n{fix}")

    def create(self, rank: int = 0) -> None:
        """Create the folder and those in it, for a process that will write it as `rank`.

        Raises:
            ConfigError: it, or a part of it, cannot be written.
            DataError: its file system has no locks, so `lock` would fail.
            DiskFull: there is no room.
        """
        folders = (self.checkpoints, self.validation, self.logs)
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            check_locks(self.path, "set runs to a folder on another file system")
        except OSError as error:
            raise_if_passing(error)
            raise cannot_be_written(self.path, error) from None
        check_writable(self.path, (*folders, self.events.path, self._lock_file, self.log_file(rank)))

    def freeze(self, plan: "Plan", start_digest: str | None) -> None:
        """Check the stage, and at its first start write what `check` compares."""
        self.check(plan, start_digest)
        if not self.recipe.exists():
            try:
                text = yaml.safe_dump(stage_settings(plan, start_digest), sort_keys=False, width=math.inf)
                write_atomically(self.recipe, without_secrets(text))  # nobody reads the data by it
            except OSError as error:
                raise cannot_be_written(self.path, error) from None

    def refuse_other_run(self, checkpoint: str, run_id: object) -> None:
        """Refuse a checkpoint of the stage's result that another run has written since: `run_id` is in its manifest.

        Raises:
            ConfigError: it is not of this run, nor of one that this folder was copied from.
        """
        identity = identity_of(self.path)
        if run_id is not None and identity is not None and str(run_id) not in identity.ids:
            raise ConfigError(
                f"{checkpoint}: another run than {self.path} has written this checkpoint (id {run_id} instead of "
                f"{identity.id}); restore the checkpoint from a copy, or train the stage again in a run of another name"
            )

    def lock(self, node: str = "") -> BinaryIO:
        """Hold the folder for this process on `node` until the file that is returned is closed.

        Raises:
            ConfigError, RunInUse: another process runs this stage; see `run_access.hold`.
        """
        return hold(self._lock_file, self.events, node)

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    def held(self) -> bool:
        """Whether a process that this machine can see runs the stage. Writes nothing."""
        try:
            with open_regular(self._lock_file) as lock:
                # Shared and released at once: observers do not see each other, and a start that waits does not notice.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no file, or a file system without locks
            return False
        return False

    def finish(self, result: StageResult) -> None:
        """Publish `result.json`: the stage is done."""
        write_atomically(self.path / "result.json", json.dumps(to_json(result), indent=1) + "\n")
        self.events.record(Event.FINISH)

    def result(self) -> StageResult | None:
        """What `finish` published, or None while the stage is not done.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.path / "result.json"
        try:
            return parse_json(StageResult, read_regular(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise_if_passing(error)
            raise ConfigError(
                f"{path}: damaged ({error}); restore it from a copy, or remove it and run the stage again, which "
                "continues from its last checkpoint"
            ) from None


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
    return absolute_location(result.checkpoint, folder)


def absolute_location(checkpoint: str, folder: RunFolder) -> str:
    """Path or URL of a checkpoint that a `result.json` in `folder` names."""
    return checkpoint if is_remote(checkpoint) else str(folder.path.parent / checkpoint)


def relative_location(checkpoint: str, folder: RunFolder) -> str:
    """A checkpoint's location as `result.json` has it: relative to the recipe's folder if it is below that, so that
    the folder can be moved, and complete otherwise.
    """
    if not is_remote(checkpoint) and Path(checkpoint).is_relative_to(folder.path.parent):
        return str(Path(checkpoint).relative_to(folder.path.parent))
    return checkpoint


def start_digest(recipe: "Recipe", stage: str, *, to_compare: bool = False) -> str | None:
    """What identifies the weights that a stage starts from, see `weights_digest`.

    None if it starts from none, or from a stage that is not done. If these weights no longer exist, and the stage no
    longer needs them, it is what its first start has recorded. Weights from outside of the recipe are read completely
    for it, only while the stage needs them, and `to_compare` only if there is something to compare them with.

    Raises:
        ConfigError: the checkpoint no longer exists, or is another run's.
        StorageDown, StorageRefused: a remote one that cannot be read.
    """
    start, source = recipe.stages[stage].start_stage, recipe.stages[stage].start_source
    if source is not None:
        from pipeline.initial_weights.content import source_digest

        return source_digest(recipe, stage, source, to_compare=to_compare)
    if start is None:
        return None
    from pipeline.checkpoints.lost import check_final_checkpoint, continues_alone, is_left_behind

    frozen = run_folder(recipe, stage).frozen
    if run_folder(recipe, start).result() is None:
        recorded = frozen() if is_left_behind(recipe, start) else None
        return recorded.start_digest if recorded else None
    checkpoint = final_checkpoint(recipe, start)
    storage = Storage(**recipe.stages[stage].data.storage.model_dump())
    try:
        content = manifest_bytes(checkpoint, storage)
    except FileNotFoundError:
        if continues_alone(recipe, stage) and (recorded := frozen()):
            return recorded.start_digest
        check_final_checkpoint(recipe, start)
        raise ConfigError(
            f"{checkpoint}: the checkpoint that stage {start} ended with cannot be found with data.storage of stage "
            f"{stage}; give both stages the same"
        ) from None
    with suppress(ValueError):  # a damaged manifest, as reading it will say
        run_folder(recipe, start).refuse_other_run(checkpoint, json_object(content).get("run_id"))
    return weights_digest(content)
