"""The settings of a stage as its run folder records them, and what identifies them, its data and its classes."""

import functools
import json
import os
from typing import TYPE_CHECKING, Any

from data.files.digest import json_sha256
from data.files.json_records import to_json
from data.settings_diff import flatten
from pipeline.checkpoints.manifest import RunDigests
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.checkpoints.manifest import CheckpointFacts
    from pipeline.plan import Plan, TrainPlan
    from pipeline.recipe.schema import Stage

_CHECKED_DATA = "COATNET_CHECKED_DATA"


def digests(plan: "TrainPlan") -> RunDigests:
    """What distinguishes a run from others in its checkpoints: its settings that may not change, and its data."""
    settings = {key: value for key, value in flatten(stage_settings(plan, None)).items() if not may_change(key)}
    return RunDigests(json_sha256(settings), plan.train.digest, classes_digest(plan))


def is_checkpoint_of(plan: "TrainPlan", checkpoint: "CheckpointFacts") -> bool:
    """Whether a checkpoint was saved with the settings that were in force at its step, or ended with it."""
    return any(
        part.first_step <= checkpoint.step <= part.until and checkpoint.run.digests == digests(part)
        for part in plan.parts
    )


def classes_digest(plan: "Plan") -> str:
    """What identifies the classes in their order: a classifier fits no others, even if there are as many."""
    return json_sha256(plan.classes)


def checked_data(plan: "Plan") -> dict[str, str]:
    """The environment variable by which ranks learn what data the command that starts them has checked."""
    return {_CHECKED_DATA: json.dumps(index_digests(plan))}


def refuse_other_data(plan: "Plan") -> None:
    """In a rank: refuse data other than what the command that started it has checked.

    Raises:
        ConfigError: an index or label map has changed since; it names both digests.
    """
    checked = json.loads(os.environ.get(_CHECKED_DATA, "{}"))
    for part, found in index_digests(plan).items():
        if part in checked and checked[part] != found:
            raise ConfigError(
                f"stage {plan.name}: data.{part}: the shards have changed since the command started (digest "
                f"{found[:16]} instead of {checked[part][:16]}); restore them, or repeat the command to check these"
            )


def rank_digest(plan: "Plan") -> str:
    """What must be equal on all ranks of a start: the settings of the stage with their history, and its data."""
    settings = flatten(stage_settings(plan, None))
    own = {key: value for key, value in settings.items() if key != "data.cache.folder"}
    # A rank may have read the run folder before its history was changed.
    parts = getattr(plan, "parts", ())
    return json_sha256([own, [[part.first_step, to_json(digests(part))] for part in parts]])


def stage_settings(plan: "Plan", start_digest: str | None) -> dict[str, Any]:
    """What a run folder records of a stage."""
    return {
        **own_settings(plan.name, plan.seed, plan.stage),
        "index_digests": index_digests(plan),
        "start_digest": start_digest,
    }


def own_settings(name: str, seed: int, stage: "Stage") -> dict[str, Any]:
    """The settings of a stage alone."""
    return {"stage": name, "seed": seed, **stage.model_dump(mode="json")}


def index_digests(plan: "Plan") -> dict[str, str]:
    """What identifies the shards that a stage reads, by `train` and `validation`."""
    from pipeline.plan import TrainPlan

    digests = {"validation": plan.validation.digest}
    return {"train": plan.train.digest, **digests} if isinstance(plan, TrainPlan) else digests


@functools.cache
def _changeable() -> frozenset[str]:
    from pipeline.recipe.schema import TrainStage
    from pipeline.recipe.section import changeable_settings

    return changeable_settings(TrainStage)  # an evaluation stage has some of the same


def may_change(key: str) -> bool:
    """Whether the setting, or a section that it is in, may change between two starts."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in _changeable() for count in range(1, len(parts) + 1))
