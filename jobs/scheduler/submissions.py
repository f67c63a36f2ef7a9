"""What was submitted for a recipe: `runs/<recipe>/slurm/`, with the recipe, job logs, and a record of jobs."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from data.errors import DataError, LockHeld
from data.files.atomic_file import write_atomically
from data.files.file_lock import OTHER_NODE_SECONDS, RELEASED_LATER, check_locks, hold
from data.files.json_records import parse_json
from data.remote.web_address import without_secrets
from jobs.frozen_recipe import recipe_text
from pipeline.errors import ConfigError
from pipeline.runs.json_lines import append_json_line, note_skipped

if TYPE_CHECKING:
    from pipeline.recipe.schema import Recipe

SHARDS = "shards"
"""Name, in the record, of the job before the first stage."""
FOLDER = "slurm"

_OWN_NODE_SECONDS = 60.0  # a chain of many jobs takes a while to submit
_OTHER_NODE_SECONDS = OTHER_NODE_SECONDS


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as it was submitted."""

    stage: str
    """Name of the stage; `shards` or `shards merge` for a job before the first stage."""
    job: str
    command: list[str]
    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class SubmissionFolder:
    """The folder of submissions at `path`."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe as it was last submitted, with absolute paths and without signatures of web addresses. Jobs read
        their own, see `jobs.frozen_recipe`."""
        return self.path / "recipe.yaml"

    @property
    def _record(self) -> Path:
        return self.path / "submissions.jsonl"

    def log(self, stage: str) -> Path:
        """The log of the jobs of a stage, over all starts."""
        return self.path / f"{stage.replace(' ', '-')}.log"

    def logs(self, stage: str) -> list[Path]:
        """The log of a stage's jobs, or one log for each task of an array."""
        return [path for path in (self.log(stage), *sorted(self.path.glob(f"{stage}-[0-9]*.log"))) if path.exists()]

    def lock(self) -> BinaryIO:
        """Lock the folder, for one submission at a time, until the file that is returned is closed.

        Raises:
            ConfigError: another process of this node is submitting, or the folder cannot be created.
            LockHeld: one of another node is.
            DataError: its file system has no locks.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            check_locks(self.path, "set runs to a folder on another file system")
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}; set runs to a folder you can write") from None
        other = "another `coatnet submit` is using this folder"
        try:
            return hold(self.path / ".lock", own=_OWN_NODE_SECONDS, other=_OTHER_NODE_SECONDS)
        except DataError as holder:
            raise ConfigError(f"{self.path}: {other} ({holder}); wait until it has finished, or stop it") from None
        except LockHeld as holder:
            raise LockHeld(
                f"{self.path}: {other} ({holder}); wait until it has finished, or stop it. {RELEASED_LATER}"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}; set runs to a folder you can write") from None

    def freeze(self, recipe: "Recipe") -> None:
        """Write the recipe as it is submitted now."""
        write_atomically(self.recipe, without_secrets(recipe_text(recipe)))

    def add(self, stage: str, job: str, command: Sequence[str]) -> None:
        """Record a job; returns when the record is on the disk."""
        submission = Submission(stage, job, list(command), time.time())
        append_json_line(self._record, asdict(submission), sync=True)

    def submissions(self) -> list[Submission]:
        """All jobs, oldest first."""
        if not self._record.exists():
            return []
        found, skipped = [], []
        for number, line in enumerate(self._record.read_text(errors="replace").split("\n"), 1):
            try:
                found.append(parse_json(Submission, line))
            except ValueError:
                if line.strip():
                    skipped.append(number)  # truncated by a full disk
        if skipped:
            note_skipped(self._record, tuple(skipped))
        return found

    def newest(self) -> dict[str, Submission]:
        """The last job of each stage."""
        return {submission.stage: submission for submission in self.submissions()}


def dependencies(command: Sequence[str]) -> list[str]:
    """Numbers of the jobs that an `sbatch` command makes its job wait for."""
    return re.findall(r":(\d+)", " ".join(word for word in command if word.startswith("--dependency=")))


def submission_folder(recipe: "Recipe") -> SubmissionFolder:
    """The folder of a recipe."""
    return SubmissionFolder(Path(recipe.runs) / recipe.name / FOLDER)
