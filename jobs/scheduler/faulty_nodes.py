"""Nodes that computed wrong values in a run, from its event logs: its jobs go on without them."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.scheduler import slurm
from pipeline.errors import ConfigError
from pipeline.runs.event_log import Event, RunEvent

if TYPE_CHECKING:  # commands that only look at a run do without pydantic
    from pipeline.recipe.schema import Recipe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")  # not a file, and no expression for several nodes


@dataclass(frozen=True, slots=True)
class FaultyNode:
    """A node that computed wrong values."""

    name: str
    """Its name in Slurm."""
    stage: str
    step: int
    """In which that was found, from 1; -1 if it is not recorded."""
    kinds: tuple[str, ...]
    """Of the values."""
    since: float
    """When it was found, in seconds since the epoch; of several times the last."""

    @property
    def text(self) -> str:
        """What it did, and when that was found."""
        step = f"in step {self.step:,} of {self.stage}" if self.step >= 0 else f"in {self.stage}"
        found = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"it computed wrong values {step} ({', '.join((*self.kinds, found))})"


def faulty_nodes(entries: Mapping[str, Sequence[RunEvent]]) -> tuple[FaultyNode, ...]:
    """The nodes that the event logs of a run's stages name, each once; what cannot be a node's name is left out."""
    found: dict[str, FaultyNode] = {}
    for stage, log in entries.items():
        for entry in log:
            if entry.event is not Event.MACHINE_FAULTY:
                continue
            for name in filter(_NAME.fullmatch, _texts(entry.facts.get("nodes"))):
                if name not in found or entry.seconds >= found[name].since:
                    kinds = _texts(entry.facts.get("kinds"))
                    found[name] = FaultyNode(name, stage, entry.step, kinds, entry.seconds)
    return tuple(found.values())


def faulty_nodes_of(recipe: "Recipe") -> tuple[FaultyNode, ...]:
    """Those of the run of a recipe."""
    from pipeline.runs.run_folder import run_folder

    return faulty_nodes({stage: run_folder(recipe, stage).events.entries() for stage in recipe.stages})


def found_wrong(entry: RunEvent) -> str:
    """What the entry of a faulty machine says, for a stage that has ended with it."""
    step = f" in step {entry.step:,}" if entry.step >= 0 else ""
    return f"ranks computed different values of one micro-batch{step}: a machine is faulty"


def excluded_from(job: slurm.SlurmJob) -> list[str]:
    """The nodes on which a job must not run."""
    try:
        return slurm.node_names(job.excluded)
    except (slurm.SchedulerDown, ConfigError):  # a form that Slurm here does not know: what is plain in it counts
        return job.excluded.split(",")


def _texts(fact: object) -> tuple[str, ...]:
    return tuple(one for one in fact if isinstance(one, str)) if isinstance(fact, list) else ()
