"""A sweep: one recipe as several runs that differ in some settings."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.files.atomic_file import write_atomically
from data.remote.web_address import without_secrets
from jobs.run_discovery import SWEEP_SUFFIX, read_sweep
from pipeline.errors import ConfigError
from pipeline.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Variation:
    """One run of a sweep."""

    name: str
    settings: dict[str, str]
    """The values that distinguish it, by their keys."""

    @property
    def overrides(self) -> list[str]:
        """Overrides that turn the recipe into this run."""
        return [f"name={self.name}", *(f"{key}={value}" for key, value in self.settings.items())]


def variations(name: str, sweeps: Sequence[str]) -> list[Variation]:
    """Every combination of the values in `sweeps`, each written `key=value,value...`, for the recipe `name`.

    Raises:
        ConfigError: one of them is malformed.
    """
    axes = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        # Commas inside brackets belong to a value.
        values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", text)]
        if not equals or not key.strip() or not all(values):
            raise ConfigError(
                f"--sweep {sweep}: write it key=value,value, such as optimizer.peak_learning_rate=5e-4,1e-3"
            )
        if len(set(values)) < len(values):
            raise ConfigError(f"--sweep {sweep}: a value is given twice")
        if key.strip().partition(".")[0] == "shards":
            raise ConfigError(f"--sweep {sweep}: shards are built once for all runs; submit a recipe for each of them")
        axes.append([(key.strip(), value) for value in values])
    found: list[Variation] = []
    for choice in itertools.product(*axes):
        settings = dict(choice)
        if len(settings) < len(choice):
            raise ConfigError("--sweep: a key is given twice; give it once, with all values")
        own = "-".join([name, *(f"{key.rpartition('.')[2]}-{without_secrets(value)}" for key, value in choice)])
        own = re.sub(r"[^\w.\-]+", "_", own)
        taken = {variation.name for variation in found}
        found.append(Variation(own if own not in taken else f"{own}-{len(found)}", settings))
    return found


def sweep_file(recipe: Recipe) -> Path:
    """The file that lists the runs of a recipe's sweep."""
    return Path(recipe.runs) / f"{recipe.name}{SWEEP_SUFFIX}"


def record(path: Path, found: Sequence[Variation]) -> None:
    """Add runs to the list, without signatures in their settings, which are only shown."""
    settings = {**read_sweep(path).settings} if path.exists() else {}
    settings |= {variation.name: variation.settings for variation in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, without_secrets(json.dumps({"runs": list(settings), "settings": settings}, indent=1)) + "\n")
