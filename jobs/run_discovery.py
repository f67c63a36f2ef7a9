"""Finding runs on the disk: those of a recipe, of its sweep, or of a folder."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.files.json_records import parse_json
from data.files.regular_file import read_regular
from data.files.yaml_text import YamlError, load_plain_yaml, yaml_file
from jobs.scheduler.submissions import FOLDER, SHARDS, SubmissionFolder
from pipeline.errors import ConfigError
from pipeline.runs.run_folder import RunFolder

SWEEP_SUFFIX = ".sweep.json"
"""Of the file beside the run folders of a sweep: `{"runs": [name, ...], "settings": {name: {key: value}}}`."""


_SWEPT = re.compile(r"[\w.\-]{1,255}")  # as `jobs.sweep` names runs


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """The content of that file."""

    runs: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        for name in self.runs:
            if not _SWEPT.fullmatch(name) or name in (".", ".."):
                raise ValueError(f"runs: {name!r} is not the name of a folder")


def read_sweep(file: Path) -> SweepRecord:
    """What is in the record of a sweep.

    Raises:
        ConfigError: the file is damaged or cannot be read.
    """
    try:
        return parse_json(SweepRecord, read_regular(file))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: not the record of a sweep ({error}); submit the sweep again, or remove the file"
        ) from None


@dataclass(frozen=True, slots=True)
class RunRef:
    """The run in the folder `<runs>/<recipe>`, which need not exist yet."""

    path: Path
    recipe: Mapping[str, Any]
    """All settings as plain values; empty if there is no recipe to read."""
    only: str | None = None
    """The one stage that was named."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What distinguishes it from the other runs of its sweep; empty outside a sweep."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def submissions(self) -> SubmissionFolder:
        return SubmissionFolder(self.path / FOLDER)

    def folder(self, stage: str) -> RunFolder:
        """The run folder of a stage."""
        return RunFolder(self.path / stage)

    def stages(self) -> list[str]:
        """The shard jobs that were submitted, and the stages, in the order of the chain."""
        stages = self.recipe.get("stages")
        named = list(stages) if isinstance(stages, dict) else []
        submitted = list(self.submissions.newest())
        before = [name for name in submitted if is_shard_job(name) and name not in named]
        found = [below.name for below in _stage_folders(self.path)]
        return list(dict.fromkeys([*before, *named, *found, *submitted])) if self.only is None else [self.only]


def find_runs(target: Path | None) -> list[RunRef]:
    """The runs of a recipe file, a sweep file, a run folder, the folder of a stage, or a folder of run folders.

    None means the working directory. A folder that contains a folder `runs` stands for that one.

    Raises:
        ConfigError: `target` is none of these.
    """
    path = Path.cwd() if target is None else target.absolute()
    if path.name.endswith(SWEEP_SUFFIX) and path.name != SWEEP_SUFFIX:
        path = path.with_name(path.name.removesuffix(SWEEP_SUFFIX))
    if _sweep_file(path).is_file():
        return _of_sweep(_of_run_folder(path))
    if path.is_dir():
        return _in_folder(path, was_named=target is not None)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: not a recipe file or run folder; `coatnet status` lists the runs below ./runs")
    from jobs.bundled_recipes import load_recipe  # pydantic, which folders do not need

    assert target is not None
    recipe = load_recipe(target)
    run = RunRef(Path(recipe.runs).absolute() / recipe.name, recipe.model_dump(mode="json"))
    return _of_sweep(run) if _sweep_file(run.path).is_file() else [run]


def find_chain(target: Path) -> list[RunRef]:
    """The one run at `target`, or all runs of one sweep.

    Raises:
        ConfigError: there is none, or there are several that are not a sweep.
    """
    runs = find_runs(target)
    if not runs:
        raise ConfigError(f"{target}: contains no runs; name a recipe, or a folder such as runs/NAME")
    if len(runs) > 1 and not any(run.settings for run in runs):
        raise ConfigError(f"{target}: {len(runs)} runs ({_names(runs)}); name one of them")
    return runs


def find_run(target: Path) -> RunRef:
    """The one run at `target`.

    Raises:
        ConfigError: there is none, or there are several.
    """
    runs = find_chain(target)
    if len(runs) > 1:
        raise ConfigError(f"{target}: a sweep of {len(runs)} runs; name one: {_names(runs)}")
    return runs[0]


def check_stages(runs: Sequence[RunRef], stages: Sequence[str]) -> None:
    """Refuse a stage that none of the runs has.

    Raises:
        ConfigError: it lists the stages that exist.
    """
    known = list(dict.fromkeys(stage for run in runs for stage in run.stages()))
    for stage in stages:
        if stage not in known:
            raise ConfigError(f"{runs[0].path}: no stage {stage}; there are: {', '.join(known) or 'none'}")


def is_shard_job(name: str) -> bool:
    """Whether this names a job before the first stage; names of stages have no spaces."""
    return name == SHARDS or name.startswith(f"{SHARDS} ")


def _names(runs: list[RunRef]) -> str:
    return ", ".join(os.path.relpath(run.path) for run in runs[:4]) + (", ..." if len(runs) > 4 else "")


def _in_folder(path: Path, was_named: bool) -> list[RunRef]:
    if path.name == FOLDER and _is_run(path.parent):
        path = path.parent
    if _is_stage(path):
        return [_of_run_folder(path.parent, only=path.name)]
    if _is_run(path):
        return [_of_run_folder(path)]
    below = path / "runs" if (path / "runs").is_dir() else path
    found = [_of_run_folder(run) for run in sorted(below.iterdir()) if _is_run(run)]
    if not found and (was_named or below == path):
        raise ConfigError(f"{path}: not a run folder, and contains none; name a recipe, or a folder such as runs/NAME")
    return found


def _of_run_folder(run: Path, only: str | None = None, settings: Mapping[str, str] | None = None) -> RunRef:
    """The run in a folder, with its recipe as it was submitted, if it was."""
    try:
        path = SubmissionFolder(run / FOLDER).recipe
        content = load_plain_yaml(yaml_file(path), str(path))
    except (OSError, YamlError):
        content = None
    return RunRef(run, content if isinstance(content, dict) else {}, only, settings or {})


def _sweep_file(run: Path) -> Path:
    return run.parent / (run.name + SWEEP_SUFFIX)  # `with_name` has none for the root


def _of_sweep(base: RunRef) -> list[RunRef]:
    """The runs of the sweep over a recipe; before them the recipe's own shard jobs or run, if there are any."""
    file = _sweep_file(base.path)
    record = read_sweep(file)
    swept = [_of_run_folder(file.with_name(name), settings=record.settings.get(name, {})) for name in record.runs]
    without_stages = replace(base, recipe={**base.recipe, "stages": {}})
    if all(map(is_shard_job, without_stages.stages())):  # none of its stages was ever submitted or run by itself
        base = without_stages
    return [base, *swept] if base.stages() else swept


def _is_run(path: Path) -> bool:
    submissions = SubmissionFolder(path / FOLDER)
    return submissions.recipe.exists() or bool(submissions.submissions()) or bool(_stage_folders(path))


def _is_stage(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.events.path.exists() or (folder.logs.is_dir() and folder.checkpoints.is_dir())


def _stage_folders(path: Path) -> list[Path]:
    """The folders of stages, in the order of their first starts."""
    found = [below for below in sorted(path.iterdir()) if below.is_dir() and _is_stage(below)] if path.is_dir() else []
    return sorted(found, key=_first_start)


def _first_start(stage: Path) -> float:
    recipe = stage / "recipe.yaml"
    return recipe.stat().st_mtime if recipe.exists() else float("inf")
