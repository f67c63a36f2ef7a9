"""The folder of an unfinished build beside its destination: what is being built, and what is done already."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data.building.build_record import LEFT_OUT, NOTHING_KNOWN, BuildRecord, SourceState, source_beside
from data.building.class_folders import Selection
from data.building.conversion import Conversion
from data.building.source import SourceIndex
from data.errors import DataError, LockHeld
from data.files.atomic_file import write_atomically
from data.files.file_lock import NO_LOCKS, OTHER_NODE_SECONDS, OWN_NODE_SECONDS, RELEASED_LATER, hold
from data.files.json_records import load_json, parse_json, to_record
from data.settings_diff import changed_settings

_VERSION = 2
_LOCK = ".lock"
_PART_NAME = re.compile(r"(\d+)-of-(\d+)")
_OWN_NODE_SECONDS, _OTHER_NODE_SECONDS = OWN_NODE_SECONDS, OTHER_NODE_SECONDS


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What determines the sorted runs: changing any of it requires a new build."""

    seed: int
    conversion: Conversion
    selection: Selection
    memory: int
    """Bytes of images that a process sorts at a time."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What determines how runs become shards: may be changed in the next call after an error."""

    samples_per_shard: int | None
    shard_bytes: int | None
    validation_per_class: int
    validation_fraction: float
    classes: str | None
    """Location of a class list."""
    skip_broken: bool
    index: SourceIndex | None = None
    """That of the source, if it is a WebDataset."""
    labels: str | None = None
    """Location of the file with the labels."""


class BuildPart(NamedTuple):
    """Part `number` of `parts`, from 1."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What is being built."""

    source: str
    source_bytes: int | None
    reading: ReadOptions
    writing: WriteOptions
    state: SourceState = NOTHING_KNOWN
    """Of the source when it was last begun to be read."""

    def __post_init__(self) -> None:
        if b"\0" in os.fsencode(self.source):
            raise ValueError(f"source: {self.source!r} is not a path")

    def record(self, destination: Path) -> BuildRecord:
        """What the finished shards keep of it."""
        writing = asdict(self.writing)
        del writing["index"]  # its location is the source
        options = {"seed": self.reading.seed, **asdict(self.reading.conversion), **asdict(self.reading.selection)}
        options = {name: value for name, value in options.items() if name not in LEFT_OUT or value != LEFT_OUT[name]}
        return BuildRecord(self.source, source_beside(self.source, destination), self.state, options | writing)


@dataclass(frozen=True, slots=True)
class _PlanVersion:
    version: int


class BuildFolder:
    """`.NAME.building` beside a destination NAME.

    plan.json   what is being built
    runs/       checked images; see `data.building.sorted_runs`
    parts/      for each finished part the names of its runs, and locks of those being read
    shards/     what becomes the destination
    entries/    for each finished shard its index entry
    """

    def __init__(self, destination: Path) -> None:
        named = destination if destination.name else destination.absolute()
        self.path = named.with_name(f".{named.name}.building")
        self.runs = self.path / "runs"
        self.shards = self.path / "shards"
        self.entries = self.path / "entries"
        self._parts = self.path / "parts"
        self._plan = self.path / "plan.json"

    def begin(self, plan: BuildPlan, part: BuildPart | None) -> None:
        """Create the folder, or continue in it.

        Raises:
            DataError: it contains an unfinished build of something else.
        """
        for folder in (self.runs, self._parts, self.shards, self.entries):
            folder.mkdir(parents=True, exist_ok=True)
        if self._plan.exists():
            free = set(WriteOptions.__slots__) if part is None else {"skip_broken"}
            changes = changed_settings(_options(self.plan()), _options(plan), ignored=lambda name: name in free)
            if changes:
                raise DataError(
                    f"{self.path}: contains an unfinished build with other options ({'; '.join(changes)}); continue it "
                    "with its own options, or remove that folder to start again"
                )
        write_atomically(self._plan, json.dumps({"version": _VERSION, **asdict(plan)}, indent=1), shared=True)

    def plan(self) -> BuildPlan:
        """What is being built.

        Raises:
            FileNotFoundError: no build has begun.
            DataError: the plan is damaged, or of another version of this program.
        """
        data = self._plan.read_bytes()
        try:
            content = load_json(data)
            if to_record(_PlanVersion, content).version != _VERSION:
                raise DataError(f"{self.path}: begun by another version of this program; remove that folder")
            return to_record(BuildPlan, content)
        except ValueError as error:
            raise DataError(
                f"{self._plan}: not the plan of a build ({error}); remove {self.path} to start again"
            ) from None

    @contextmanager
    def reading(self, part: BuildPart) -> Iterator[None]:
        """Let nobody else read this part, or write shards, in the meantime.

        Raises:
            DataError: another process of this node reads it or writes shards, or the file system has no locks.
            LockHeld: one of another node does.
        """
        with self._held(
            self._part_file(part).with_suffix(_LOCK), f"another process reads part {part} or merges the parts"
        ):
            yield

    def finish_part(self, part: BuildPart, runs: list[str]) -> None:
        """Record the runs of a part that has been read completely."""
        write_atomically(self._part_file(part), json.dumps(runs), shared=True)

    def all_runs(self) -> list[str]:
        """The names of the runs of all parts.

        Raises:
            DataError: a part is missing, or its file is damaged.
        """
        finished: dict[int, dict[int, Path]] = {}
        for path in self._parts.glob("*.json"):
            if match := _PART_NAME.fullmatch(path.stem):
                finished.setdefault(int(match[2]), {})[int(match[1])] = path
        if not finished:
            raise DataError(f"{self.path}: no part is finished; run: coatnet shards build ... --part 1/N")
        count, parts = max(finished.items(), key=lambda item: (len(item[1]) == item[0], len(item[1])))
        missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in parts]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise DataError(
                f"{self.path}: {len(missing)} of {count} parts are not finished: {', '.join(missing[:10])}{more}; run "
                f"them with: coatnet shards build ... --part {missing[0]}"
            )
        return sorted(name for number, path in parts.items() for name in _read_part(path, BuildPart(number, count)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing the same shards and from reading parts.

        Raises:
            DataError: another process of this node does, or the file system has no locks.
            LockHeld: one of another node does.
        """
        with ExitStack() as held:
            held.enter_context(self._held(self.path / "lock", "another process is building there"))
            for path in sorted(self._parts.glob(f"*{_LOCK}")):
                if match := _PART_NAME.fullmatch(path.stem):
                    held.enter_context(self._held(path, f"part {match[1]}/{match[2]} is still being read"))
            for folder in (self.runs, self.entries, self.shards, *filter(Path.is_dir, self.shards.iterdir())):
                for unfinished in folder.glob(".*"):
                    unfinished.unlink()
            yield

    @contextmanager
    def _held(self, path: Path, otherwise: str) -> Iterator[None]:
        try:
            lock = hold(path, own=_OWN_NODE_SECONDS, other=_OTHER_NODE_SECONDS)
        except DataError as holder:
            raise DataError(f"{self.path}: {otherwise} ({holder}); wait for it or stop it") from None
        except LockHeld as holder:
            raise LockHeld(f"{self.path}: {otherwise} ({holder}); wait for it or stop it. {RELEASED_LATER}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise DataError(
                f"{path}: the file system has no file locks ({error}); build on another one, or mount it with flock"
            ) from None
        with lock:
            yield

    def _part_file(self, part: BuildPart) -> Path:
        return self._parts / f"{part.number}-of-{part.parts}.json"

    def is_small(self) -> bool:
        """Whether removing it loses next to no work."""
        return len(list(self.runs.glob("*.npz"))) <= 1

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _options(plan: BuildPlan) -> dict[str, object]:
    source = {"source": plan.source, "source_bytes": plan.source_bytes}
    return source | asdict(plan.reading) | asdict(plan.writing)


def _read_part(path: Path, part: BuildPart) -> list[str]:
    try:
        return parse_json(list[str], path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path}: not the runs of a part ({error}); remove it and read the part again with: coatnet shards build "
            f"... --part {part}"
        ) from None
