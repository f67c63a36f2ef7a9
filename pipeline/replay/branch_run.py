"""A branch of a run that goes on as a run of its own: its folder, its identity, its checkpoints."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import yaml

from data.files.atomic_file import write_atomically
from data.files.json_records import to_json
from data.remote.web_address import without_secrets
from pipeline.checkpoints.manifest import step_name
from pipeline.checkpoints.store import CheckpointStore, checkpoint_store
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.replay.recorded_stage import RecordedStage
from pipeline.replay.step_replay import StepReplay
from pipeline.runs.continuation import computed_with
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import BranchOrigin, establish_identity, identity_of
from pipeline.runs.settings_history import KEY, VERSION, SettingsHistory
from pipeline.runs.stage_settings import stage_settings


@dataclass(frozen=True, slots=True)
class BranchRun:
    """A run that another one has become by other settings from a step on; see `begin`."""

    folder: RunFolder
    """Of the stage."""
    store: CheckpointStore
    run_id: str
    lock: BinaryIO | None
    """Of the leader, held until the branch is complete."""

    @classmethod
    def begin(
        cls, path: Path, recorded: RecordedStage, plan: TrainPlan, history: SettingsHistory, ranks: Ranks
    ) -> Self:
        """Make the run folder `path`, which must not exist, for the stage as it goes on after the steps before it.

        Args:
            path: `runs/NAME`.
            recorded: the stage that it leaves.
            plan: of the branch.
            history: of its settings.
            ranks: all of them.

        Raises:
            ConfigError: the folder exists, or cannot be written.
        """
        folder, run_id, lock = RunFolder(path / recorded.name), "", None
        if ranks.is_leader:
            refuse_existing_run(path)
            folder.create()
            lock = folder.lock()
            origin = BranchOrigin(recorded.run_id, str(recorded.folder.path.resolve()), plan.first_step)
            run_id = establish_identity(folder.path, origin).id  # first: it says whose it is if this is interrupted
            content = stage_settings(plan, recorded.frozen.start_digest)
            if history.entries:
                content[KEY] = to_json(SettingsHistory(VERSION, history.entries))
            write_atomically(folder.recipe, without_secrets(yaml.safe_dump(content, sort_keys=False, width=math.inf)))
            folder.events.record(
                Event.BRANCH, step=plan.first_step, of=origin.folder, run=origin.run, changed=list(recorded.branched)
            )
            now = computed_with(plan, ranks)
            folder.events.record(Event.RESUME, step=plan.first_step, ranks=ranks.world_size, computed_with=now)
        run_id = ranks.broadcast_text(0, run_id)
        return cls(folder, checkpoint_store(folder, plan.stage), run_id, lock)

    def save(self, replay: StepReplay) -> None:
        """Save where the branch stands.

        Raises:
            RunFailed, StorageDown: it cannot be saved.
        """
        replay.save(self.store, self.folder, self.run_id)

    def finish(self, replay: StepReplay) -> None:
        """Save where the branch ends, say so in its event log, and let other processes go on with the run.

        Raises:
            RunFailed, StorageDown: as for `save`.
        """
        self.save(replay)
        if self.lock:
            name = step_name(replay.step)
            self.folder.events.record(Event.STOP, reason="coatnet replay", step=replay.step, checkpoint=name)
            self.lock.close()


def is_unfinished_branch(path: Path, stage: RunFolder) -> bool:
    """Whether `path` holds a branch of `stage` that no process is making any longer, and that was not completed.

    Raises:
        ConfigError: the record of its identity is damaged.
    """
    folder = RunFolder(path / stage.path.name)
    found = identity_of(folder.path) if folder.path.is_dir() else None
    is_branch = (
        found is not None and found.branch_of is not None and found.branch_of.folder == str(stage.path.resolve())
    )
    return is_branch and not folder.held()


def refuse_existing_run(path: Path) -> None:
    """Refuse the name of a run that is taken.

    Raises:
        ConfigError: there is something at `path`.
    """
    if path.exists():
        raise ConfigError(f"{path}: exists already; give the branch another name")
