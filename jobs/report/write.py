"""Writes the report of a run to a file."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data.errors import raise_if_passing
from data.files.atomic_file import write_atomically
from data.files.regular_file import open_regular
from data.text.counted import counted
from jobs.report.content import read_run
from jobs.report.page import GENERATOR, page
from jobs.run_discovery import RunRef
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A report that has been written."""

    path: Path
    stages: str
    """How many there are, in words."""
    kilobytes: int
    missing: list[str]
    """What is not in it, and why."""


def write_report(run: RunRef, path: Path, *, overwrite: bool) -> WrittenReport:
    """Write the report of `run` to `path`.

    Raises:
        ConfigError: there is another file than an earlier report, nothing of the run, or it cannot be written.
    """
    if not overwrite:
        _refuse_other_file(path)
    if not run.path.is_dir():
        raise ConfigError(f"{run.path}: there is nothing to report: the run has not been started")
    content = read_run(run)
    text = page(content, _version())
    try:
        write_atomically(path, text)
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}); name another file with --out"
        ) from None
    stages = counted(len(content.stages), "stage")
    return WrittenReport(path, stages, max(1, len(text.encode()) // 1000), content.missing)


def _refuse_other_file(path: Path) -> None:
    try:
        with open_regular(path) as file:
            beginning = file.read(300)
    except FileNotFoundError:
        return
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(f"{path}: {error.strerror or error}; name a file with --out") from None
    if f'content="{GENERATOR}"'.encode() not in beginning:
        raise ConfigError(
            f"{path}: exists and is not an earlier report; replace it with --overwrite, or give another --out"
        )


def _version() -> str:
    try:
        return version("coatnet-pretraining")
    except PackageNotFoundError:
        return "of a checkout"
