"""What a start says about its stage before the first step: classes, evaluation, and which classifier it begins with."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from data.files.digest import json_sha256
from data.images.augment import center_crop_share
from data.settings_diff import changed_settings
from data.text.counted import counted
from models.complexity import count_parameters
from pipeline.host import this_host
from pipeline.plan import Plan, TrainPlan
from pipeline.ranks.device_settings import GPU_PROMISES
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import Stage
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_result import distinct_names
from pipeline.runs.stage_settings import may_change


def class_list(classes: Sequence[str]) -> str:
    """How many classes, the first and the last, and what identifies the list: names and order decide."""
    names = f", {classes[0]} to {classes[-1]}" if len(classes) > 1 else f", {classes[0]}" if classes else ""
    return f"{counted(len(classes), 'class', 'classes')}{names} ({list_name(json_sha256(classes))})"


def list_name(classes_digest: str) -> str:
    """How a class list is called: by the beginning of its digest, equal only for the same names in the same order."""
    return f"class list {classes_digest[:8]}"


def evaluation_view(stage: Stage) -> str:
    """What evaluations see of a picture."""
    size = stage.resolution
    if stage.data.evaluation_crop == "whole":
        return f"whole images, resized to {size} x {size} pixels"
    share = center_crop_share(size)
    return f"the central {share:.0%} of a square picture and less of others, so {1 - share:.0%} or more is cut away"


def banner(plan: Plan, ranks: Ranks, folder: RunFolder) -> list[str]:
    """Lines about what a start computes, on which devices, and where to watch it."""
    stage, host, promise = plan.stage, this_host().text, list[str]()
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
        where = f"{counted(ranks.world_size, 'rank')} on {device}, rank 0 on a machine with {host}"
        promise = [f"deterministic: {str(stage.deterministic).lower()}, {GPU_PROMISES[stage.deterministic]}"]
    else:
        threads = counted(torch.get_num_threads(), "thread")
        where = f"{counted(ranks.world_size, 'rank')} with {threads} each on CPUs, rank 0 on a machine with {host}"
    parameters = count_parameters(stage.model.variant, stage.resolution, len(plan.classes))
    size = f"{stage.model.name} with {parameters:,} parameters, {stage.resolution} pixels, {stage.precision}"
    run = os.path.relpath(folder.path)
    return [
        f"{where}; {size}",
        *promise,
        f"logs in {os.path.relpath(folder.logs)}; curves with: coatnet tensorboard {shlex.quote(run)}",
    ]


def announcements(plan: Plan) -> list[str]:
    """Lines about the data, the evaluation and the saves of a stage."""
    lines = [f"evaluates on {counted(plan.validation.samples, 'sample')} of {class_list(plan.classes)}"]
    if isinstance(plan, TrainPlan):
        lines = [f"trains on {plan.train.samples:,} and {lines[0]}"]
        evaluations, saves = plan.stage.evaluation.every_steps or plan.steps, plan.stage.checkpoint.interval
        before = f"after every {_steps(evaluations)} and " if evaluations < plan.steps else ""
        when = f"after every {_steps(saves)}" if saves <= plan.steps else "at the end"
        lines.append(f"takes {counted(plan.steps, 'step')}, evaluates {before}at the end, and saves {when}")
        lines += map(str, changes_of_settings(plan))
    return [*lines, f"evaluations see {evaluation_view(plan.stage)}"]


@dataclass(frozen=True, slots=True)
class ChangedSettings:
    """Settings that were changed while a stage was under way."""

    step: int
    """Steps taken before."""
    changed: tuple[str, ...]
    """`key: old -> new`."""

    def __str__(self) -> str:
        return f"settings changed after step {self.step:,}: {'; '.join(self.changed)}"


def changes_of_settings(plan: TrainPlan) -> list[ChangedSettings]:
    """The changes of settings until the steps of `plan`, oldest first."""
    found = []
    for part in plan.parts[1:]:
        assert part.earlier is not None
        old, new = (one.stage.model_dump(mode="json") for one in (part.earlier, part))
        found.append(ChangedSettings(part.first_step, tuple(changed_settings(old, new, may_change))))
    return found


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count:,} steps"


class TableRow(NamedTuple):
    """What happened to some of the tensors that a stage starts with."""

    what: str
    """`taken`, `resized`, `zero`, `begun anew` or `left out`."""
    tensors: int
    which: str


@dataclass(frozen=True, slots=True)
class StartingWeights:
    """What a stage takes from weights that it did not train, and what of it is changed or begins anew."""

    checkpoint: str
    """Where they are: see `run_folder.relative_location`."""
    origin: str
    """Whose they are, such as `stage pretrain`."""
    step: int | None
    """Steps that they were trained for, if that is known."""
    weights: Literal["raw", "ema"]
    keeps_classifier: bool
    classifier: str
    """A sentence on whether the classifier is kept, and why."""
    table: tuple[TableRow, ...]
    resized: Mapping[str, int]
    """How many relative position tables are resized, by the sizes before and after."""
    precision: str | None
    """Of the training, if that is known."""
    remarks: tuple[str, ...] = ()
    """What had to be assumed."""

    def announcements(self, plan: Plan) -> list[str]:
        """Lines about it."""
        chosen = "the moving average of the weights" if self.weights == "ema" else "the raw weights"
        trains = isinstance(plan, TrainPlan)
        anew = ", with new optimizer state" if trains else ""
        lines = [f"{'starts from' if trains else 'evaluates'} {chosen} in {self.checkpoint}{anew}"]
        if trains:
            lines.append(self.classifier)
        width = max(len(row.what) for row in self.table)
        lines += [f"weights {row.what:<{width}}  {row.tensors:>5,}  {row.which}" for row in self.table]
        if self.precision is not None and self.precision != plan.stage.precision:
            lines.append(f"precision: {self.precision} in {self.origin}, now {plan.stage.precision}")
        return [*lines, *(f"warning: {remark}" for remark in self.remarks)]

    def facts(self, plan: Plan) -> dict[str, Any]:
        """The same for the event log."""
        return {
            "step": 0 if isinstance(plan, TrainPlan) else self.step or 0,
            "checkpoint": self.checkpoint,
            "origin": self.origin,
            "weights": self.weights,
            "classifier": "kept" if self.keeps_classifier else "new",
            "reason": self.classifier,
            "resized": dict(self.resized),
            "table": [row._asdict() for row in self.table],
            "precision": [self.precision, plan.stage.precision],
            "remarks": list(self.remarks),
        }


class EarlierClasses(NamedTuple):
    """What is known about the classes of a trained model."""

    outputs: int
    """0 without a classifier."""
    names: Sequence[str] | None
    digest: str | None
    """Identifies the names in their order."""


def classifier_announcement(classes: Sequence[str], origin: str, earlier: EarlierClasses) -> tuple[bool, str]:
    """Whether the classifier of a trained model from `origin` is kept, and a sentence that says why.

    The names and the order of `classes` decide; where `earlier` has no names, their number.
    """
    ours, theirs = json_sha256(classes), earlier.digest
    if earlier.outputs == 0:
        return False, f"starts with a new classifier, because {origin} has none"
    if theirs is None and earlier.outputs == len(classes):
        return True, (
            f"starts with the classifier of {origin}: {counted(len(classes), 'class', 'classes')} as here, without "
            "their names, so whether they mean the same is for you to know"
        )
    if ours == theirs:
        numbered = all(name.isdigit() for name in classes)
        doubt = "; they are only numbered, so whether they mean the same is for you to know" if numbered else ""
        return True, f"starts with the classifier of {origin}: the same classes ({list_name(ours)}){doubt}"
    called = f", {list_name(theirs)}" if theirs else ""
    return False, (
        f"starts with a new classifier, because {origin} was trained for other classes "
        f"({earlier.outputs:,}{called}{_difference(earlier.names or (), classes)})"
    )


def _difference(before: Sequence[str], classes: Sequence[str]) -> str:
    for number, (old, new) in enumerate(zip(distinct_names(before), distinct_names(classes), strict=False)):
        if old != new:
            return f"; class {number} was {old} and is {new}"
    return ""


def started_with(events: EventLog) -> dict[str, Any] | None:
    """What the newest event `weights` of a stage says, for its result; None without one."""
    found = events.of(Event.WEIGHTS)
    return dict(found[-1].facts) if found else None
