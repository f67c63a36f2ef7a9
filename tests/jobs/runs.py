"""Run folders in every condition, written by hand as stages and jobs would write them."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.scheduler import slurm
from jobs.scheduler.slurm import SlurmJob
from jobs.scheduler.submissions import FOLDER, Submission, SubmissionFolder
from pipeline.monitoring.progress import StageProgress
from pipeline.runs.run_folder import RunFolder
from tests.support.records import stage_result


def at(seconds: float, style: str = "%Y-%m-%d %H:%M:%S") -> str:
    """The time `seconds` ago."""
    return time.strftime(style, time.localtime(time.time() - seconds))


class MadeRun:
    """A run `runs/<name>` in `folder`."""

    def __init__(self, folder: Path, name: str = "small") -> None:
        self.name = name
        self.path = folder / "runs" / name
        self.submissions = SubmissionFolder(self.path / FOLDER)

    def freeze(self, **stages: dict[str, Any]) -> None:
        """Write the recipe as `coatnet submit` does; by default one of two stages."""
        self.submissions.path.mkdir(parents=True, exist_ok=True)
        stages = stages or {"pretrain": {"task": "train", "steps": 40}, "finetune": {"task": "train", "steps": 6}}
        recipe = {"name": self.name, "runs": str(self.path.parent), "stages": stages}
        self.submissions.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def submit(self, stage: str, job: str, *options: str, ago: float = 600) -> None:
        """Record a job."""
        self.submissions.path.mkdir(parents=True, exist_ok=True)
        submission = Submission(stage, job, ["sbatch", "--parsable", *options], time.time() - ago)
        with open(self.submissions.path / "submissions.jsonl", "a") as record:
            content = {name: getattr(submission, name) for name in Submission.__slots__}
            record.write(json.dumps(content) + "\n")

    def log(self, stage: str, *lines: str, task: str = "") -> Path:
        """Append lines to the log of a stage's jobs."""
        self.submissions.path.mkdir(parents=True, exist_ok=True)
        path = self.submissions.path / f"{stage.replace(' ', '-')}{task}.log"
        with open(path, "a") as log:
            log.write("".join(f"{line}\n" for line in lines))
        return path

    def stage(self, name: str) -> RunFolder:
        """Create the run folder of a stage, as a start does."""
        folder = RunFolder(self.path / name)
        folder.create()
        return folder

    def note(self, stage: str, event: str, ago: float = 0, **facts: Any) -> None:
        """Append an entry to the event log, `ago` seconds old."""
        entry = {"time": at(ago, "%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts}
        with open(self.stage(stage).events.path, "a") as events:
            events.write(json.dumps(entry) + "\n")

    def progress(self, stage: str, step: int, steps: int, ago: float = 0, left: float | None = None) -> None:
        """Write the progress file of a training stage, `ago` seconds old."""
        StageProgress(step, steps, 1.25, 512.0, left, time.time() - ago).write(self.stage(stage).progress)

    def finish(self, stage: str, steps: int = 40) -> None:
        """Write the result of a stage that is done."""
        checkpoint = f"{stage}/checkpoints/step-{steps:08d}"
        (self.path / checkpoint).mkdir(parents=True, exist_ok=True)
        (self.path / checkpoint / "manifest.json").touch()
        self.stage(stage).finish(stage_result(checkpoint, stage, steps))

    def exit(self, stage: str, code: int, message: str, rank: int = 0, ago: float = 0) -> None:
        """Append the line with which the log of a rank ends."""
        record = logging.LogRecord("test", logging.ERROR, "", 0, "exit %d: %s", (code, message), None)
        record.created, record.msecs = time.time() - ago, 0
        line = logging.Formatter("%(asctime)s %(levelname)s %(message)s").format(record)
        with open(self.stage(stage).log_file(rank), "a") as log:
            log.write(line + "\n")


def status(*arguments: str | Path) -> Result:
    """`coatnet status` in this process."""
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def rows(*arguments: str | Path) -> list[dict[str, Any]]:
    """Its JSON object for each stage."""
    result = status(*arguments, "--json")
    assert result.exit_code == 0, result.output
    stages: list[dict[str, Any]] = json.loads(result.stdout)["stages"]
    return stages


def row(*arguments: str | Path) -> dict[str, Any]:
    """The first of the rows."""
    return rows(*arguments)[0]


def lines(result: Result) -> list[list[str]]:
    """The words of each line."""
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.output.splitlines()]


def slurm_reports(monkeypatch: pytest.MonkeyPatch, *jobs: SlurmJob) -> None:
    """Stand in for Slurm, which knows these jobs."""
    known = {job.number: job for job in jobs}
    monkeypatch.setattr(
        slurm, "jobs", lambda numbers: {one: known.get(one, SlurmJob(one, "UNKNOWN")) for one in numbers}
    )


@contextmanager
def running(run: MadeRun, stage: str) -> Iterator[None]:
    """Hold the stage's folder, as a running process does."""
    lock = run.stage(stage).lock()
    try:
        yield
    finally:
        lock.close()
