"""What would stop the job on the cluster, as far as it shows on another machine.

These are checks of `coatnet doctor` and of a start, made with the ranks of the rehearsal.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from data.errors import CoatnetError
from pipeline.checkpoints.claim import refuse_foreign_place
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError
from pipeline.plan import Plan, TrainPlan, check_ranks
from pipeline.preflight.disk_space import assess_writable, existing_parent
from pipeline.preflight.finding import Finding, Findings, finding_of_error
from pipeline.preflight.memory import assess_memory
from pipeline.preflight.network import assess_interface
from pipeline.preflight.settings import assess_settings
from pipeline.preflight.shards import ShardAssessor
from pipeline.ranks.rendezvous import check_world_size, read_rendezvous
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.recipe.sections import Resources
from pipeline.rehearsal.sample_shares import AssumedData
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import run_folder

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STAND_IN = {"MASTER_ADDR": "the-first-node", "MASTER_PORT": "29500"}
"""What slurm/launch.sh sets, where the environment has none."""


def training_stage(recipe: Recipe, name: str) -> TrainStage:
    """The stage `name`, which trains.

    Raises:
        ConfigError: there is none, or it does not.
    """
    if name not in recipe.stages:
        raise ConfigError(f"recipe {recipe.name} has no stage {name}; its stages are {', '.join(recipe.stages)}")
    stage = recipe.stages[name]
    if not isinstance(stage, TrainStage):
        raise ConfigError(
            f"stage {name}: it only evaluates, and there is nothing of it to rehearse; name one that trains"
        )
    return stage


def on_ranks(recipe: Recipe, name: str, ranks: int) -> Recipe:
    """The recipe with stage `name` on `ranks` ranks, as many on a node as before.

    Raises:
        ConfigError: as when a recipe has these numbers, or the ranks do not divide the micro-batches of a step.
    """
    stage, where = training_stage(recipe, name), f"stage {name}: "
    check_ranks(stage, ranks, where)
    per_node = min(ranks, stage.resources.ranks_per_node)
    settings = stage.resources.model_dump() | {"ranks": ranks, "nodes": -(-ranks // per_node)}
    try:
        resources = Resources.model_validate(settings)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}resources: {message}; rehearse a multiple of {per_node} ranks") from None
    changed = stage.model_copy(update={"resources": resources})
    return recipe.model_copy(update={"stages": {**recipe.stages, name: changed}})


def cluster_findings(recipe: Recipe, name: str, assumed: AssumedData | None) -> tuple[list[Finding], TrainPlan | None]:
    """What was found about stage `name`, whose ranks are those of the rehearsal, and its plan.

    The plan is None if its shards are missing or wrong: a warning if others are `assumed`, otherwise an error.
    """
    stage = training_stage(recipe, name)
    found = [*assess_settings(recipe, name, elsewhere=True)]
    about_shards, plan = ShardAssessor(recipe).assess(name)
    for finding in about_shards:
        if finding.level == "error" and plan is None and assumed is not None:
            fix = (
                f"{finding.fix}; the rehearsal goes on with made-up shards"
                if finding.fix
                else "made-up shards are used"
            )
            finding = Finding("warning", name, finding.what, fix)
        found.append(finding)
    classes = len(plan.classes) if plan is not None else assumed.classes if assumed is not None else 0
    if classes:
        begun = bool(run_folder(recipe, name).events.of(Event.SAVE))
        found += assess_memory(name, stage, classes, begun=begun)
    found += _place_findings(recipe, name, stage)
    found += assess_interface([stage])
    found += _meeting_findings(name, stage.resources, os.environ)
    return list(dict.fromkeys(found)), _training(plan)


def _training(plan: Plan | None) -> TrainPlan | None:
    assert plan is None or isinstance(plan, TrainPlan)
    return plan


def _place_findings(recipe: Recipe, name: str, stage: TrainStage) -> list[Finding]:
    """Whether the run folder and the place of the checkpoints can be this run's."""
    found, folder = Findings(name), run_folder(recipe, name)
    try:
        store = checkpoint_store(folder, stage)
        refuse_foreign_place(store, folder)
        folder.check_settings(recipe)
        for path in dict.fromkeys([str(folder.path), *([] if store.remote else [store.location])]):
            home = existing_parent(Path(path))
            unwritable = assess_writable(name, home)
            if unwritable is not None:
                found.append(unwritable)
            else:
                found.ok(f"{path}: can be created on this machine" if str(home) != path else f"{path}: can be written")
    except CoatnetError as error:
        found.append(finding_of_error(name, error))
    return list(dict.fromkeys(found))


def _meeting_findings(name: str, resources: Resources, environment: Mapping[str, str]) -> list[Finding]:
    """Whether what the environment says of where the ranks meet can be right.

    Nothing listens or connects, and no name is resolved: neither the nodes nor their names are known here.
    """
    found = Findings(name)
    given = {key: environment[key] for key in _STAND_IN if environment.get(key)}
    with found.capture():
        if any(environment.get(key) for key in _OF_A_RANK):
            check_world_size(name, resources.ranks, read_rendezvous(environment))
        last = {
            "RANK": str(resources.ranks - 1),
            "WORLD_SIZE": str(resources.ranks),
            "LOCAL_RANK": str(resources.ranks_per_node - 1),
            "LOCAL_WORLD_SIZE": str(resources.ranks_per_node),
        }
        read_rendezvous({**_STAND_IN, **given, **last})
        said = ", ".join(f"{key}={value}" for key, value in given.items()) or "not set, as the job chooses them"
        found.ok(
            f"MASTER_ADDR and MASTER_PORT: {said}; whether ranks can listen and connect there shows only on the nodes"
        )
    return found
