"""The folder of an unfinished build beside its destination: what it is building, and how far it is."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from data.atomic_file import atomic_file
from data.building.conversion import Conversion
from data.errors import DataError

_VERSION = 1


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What decides about the runs: another value needs a build from the beginning."""

    seed: int
    conversion: Conversion
    within: str | None
    memory: int
    """Bytes of images that a process sorts at a time."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What decides how runs become shards: may be changed for the next call after a refusal."""

    samples_per_shard: int | None
    shard_bytes: int | None
    validation_per_class: int
    validation_fraction: float
    classes: str | None
    """Place of a class list."""
    skip_broken: bool


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


class BuildFolder:
    """`.NAME.building` beside a destination NAME.

    plan.json   what is being built
    runs/       checked images; see `data.building.sorted_runs`
    parts/      for each finished part the names of its runs
    shards/     what becomes the destination
    entries/    for each finished shard what it holds
    """

    def __init__(self, destination: Path) -> None:
        whole = destination if destination.name else destination.absolute()
        self.path = whole.with_name(f".{whole.name}.building")
        self.runs = self.path / "runs"
        self.shards = self.path / "shards"
        self.entries = self.path / "entries"

    def begin(self, plan: BuildPlan, part: BuildPart | None) -> None:
        """Make the folder, or continue in it.

        Raises:
            DataError: an unfinished build of something else lies there.
        """
        for folder in (self.runs, self.path / "parts", self.shards, self.entries):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            before = self.plan()
        except FileNotFoundError:
            before = None
        if before is not None:
            old, new = _flat(asdict(before)), _flat(asdict(plan))
            free = {f"writing.{name}" for name in WriteOptions.__slots__} if part is None else {"writing.skip_broken"}
            changes = [
                f"{name.rpartition('.')[2]} was {old.get(name)}, now {new[name]}"
                for name in new
                if old.get(name) != new[name] and name not in free
            ]
            if changes:
                raise DataError(
                    f"{self.path}: an unfinished build with other options lies there ({'; '.join(changes)}); continue "
                    "it with its own options, or remove that folder to begin anew"
                )
        with atomic_file(self.path / "plan.json", shared=True) as file:
            file.write(json.dumps({"version": _VERSION, **asdict(plan)}, indent=1).encode())

    def plan(self) -> BuildPlan:
        """What is being built.

        Raises:
            FileNotFoundError: nothing is.
            DataError: by another version of this program.
        """
        content: dict[str, Any] = json.loads((self.path / "plan.json").read_bytes())
        if content.pop("version") != _VERSION:
            raise DataError(f"{self.path}: begun by another version of this program; remove that folder")
        reading = content["reading"]
        return BuildPlan(
            content["source"],
            content["source_bytes"],
            ReadOptions(**{**reading, "conversion": Conversion(**reading["conversion"])}),
            WriteOptions(**content["writing"]),
        )

    def finish_part(self, part: BuildPart, runs: list[str]) -> None:
        with atomic_file(self.path / "parts" / f"{part.number}-of-{part.parts}.json", shared=True) as file:
            file.write(json.dumps(runs).encode())

    def all_runs(self) -> list[str]:
        """The names of the runs of all parts.

        Raises:
            DataError: a part is missing.
        """
        finished: dict[int, dict[int, Path]] = {}
        for path in (self.path / "parts").glob("*.json"):
            if match := re.fullmatch(r"(\d+)-of-(\d+)", path.stem):
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
        return sorted(name for path in parts.values() for name in json.loads(path.read_bytes()))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off other processes that would write the same shards.

        Raises:
            DataError: another process does.
        """
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"{self.path}: another process is building there; wait for it or stop it") from None
        try:
            for folder in (self.runs, self.entries, self.shards, *filter(Path.is_dir, self.shards.iterdir())):
                for unfinished in folder.glob(".*"):
                    unfinished.unlink()
            yield
        finally:
            lock.release()

    def is_small(self) -> bool:
        """Whether next to nothing is lost with it."""
        return len(list(self.runs.glob("*.npz"))) <= 1

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
