"""What a start says about its stage before the first step: classes, evaluation, and which classifier it begins with."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from data.files.digest import json_sha256
from data.images.augment import center_crop_share
from data.text.counted import counted
from models.complexity import count_parameters
from pipeline.checkpoints.manifest import RunFacts
from pipeline.host import this_host
from pipeline.plan import Plan, TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import Stage
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_result import StageResult, distinct_names


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
    stage, host = plan.stage, this_host().text
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
        where = f"{counted(ranks.world_size, 'rank')} on {device}, rank 0 on a machine with {host}"
    else:
        threads = counted(torch.get_num_threads(), "thread")
        where = f"{counted(ranks.world_size, 'rank')} with {threads} each on CPUs, rank 0 on a machine with {host}"
    parameters = count_parameters(stage.model.variant, stage.resolution, len(plan.classes))
    size = f"{stage.model.name} with {parameters:,} parameters, {stage.resolution} pixels, {stage.precision}"
    run = os.path.relpath(folder.path)
    return [
        f"{where}; {size}",
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
    return [*lines, f"evaluations see {evaluation_view(plan.stage)}"]


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count:,} steps"


@dataclass(frozen=True, slots=True)
class StartingWeights:
    """What a stage takes from the checkpoint of an earlier stage, and what of it is changed or begins anew."""

    checkpoint: str
    """See `run_folder.relative_location`."""
    step: int
    weights: Literal["raw", "ema"]
    earlier: RunFacts
    """Of the checkpoint."""
    resized: Mapping[str, int]
    """See `weights.resized_tables`."""

    def announcements(self, plan: Plan, result: StageResult | None) -> list[str]:
        """Lines about it; `result` is that of the earlier stage and has the names of its classes."""
        chosen = "the moving average of the weights" if self.weights == "ema" else "the raw weights"
        trains = isinstance(plan, TrainPlan)
        anew = ", with new optimizer state" if trains else ""
        lines = [f"{'starts from' if trains else 'evaluates'} {chosen} in {self.checkpoint}{anew}"]
        if trains:
            lines.append(classifier_announcement(plan, self.earlier, result))
        if self.resized:
            sizes = ", ".join(f"{count} from {sizes}" for sizes, count in self.resized.items())
            lines.append(f"relative position tables are resized for {plan.stage.resolution} pixels: {sizes}")
        if self.earlier.precision != plan.stage.precision:
            lines.append(
                f"precision: {self.earlier.precision} in stage {self.earlier.stage}, now {plan.stage.precision}"
            )
        return lines

    def facts(self, plan: Plan, result: StageResult | None) -> dict[str, Any]:
        """The same for the event log."""
        kept = json_sha256(plan.classes) == self.earlier.digests.classes_digest
        return {
            "step": 0 if isinstance(plan, TrainPlan) else self.step,
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "classifier": "kept" if kept else "new",
            "reason": classifier_announcement(plan, self.earlier, result),
            "resized": dict(self.resized),
            "precision": [self.earlier.precision, plan.stage.precision],
        }


def classifier_announcement(plan: Plan, earlier: RunFacts, result: StageResult | None) -> str:
    """Whether the classifier of an `earlier` stage is kept, decided by the names and the order of the classes.

    `result` is that of the earlier stage and has the names of its classes.
    """
    ours, theirs = json_sha256(plan.classes), earlier.digests.classes_digest
    if ours == theirs:
        numbered = all(name.isdigit() for name in plan.classes)
        doubt = "; they are only numbered, so whether they mean the same is for you to know" if numbered else ""
        return f"starts with the classifier of stage {earlier.stage}: the same classes ({list_name(ours)}){doubt}"
    return (
        f"starts with a new classifier, because stage {earlier.stage} was trained for other classes "
        f"({earlier.model['num_classes']:,}, {list_name(theirs)}{_difference(result, plan)})"
    )


def _difference(result: StageResult | None, plan: Plan) -> str:
    before = result.classes if result else {}
    for number, (old, new) in enumerate(zip(before, distinct_names(plan.classes), strict=False)):
        if old != new:
            return f"; class {number} was {old} and is {new}"
    return ""
