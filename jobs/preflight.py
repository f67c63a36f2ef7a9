"""What can be checked about a recipe on this machine, before any of its stages runs."""

from collections.abc import Iterator, Sequence

from data.errors import CoatnetError
from data.remote.cache import Cache
from jobs.scheduler.dry_run import dry_run
from jobs.scheduler.faulty_nodes import faulty_nodes_of
from pipeline.checkpoints.claim import refuse_foreign_place
from pipeline.checkpoints.lost import continues_alone
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError
from pipeline.initial_weights.start import checked_start, openable_start
from pipeline.model_check import check_model
from pipeline.plan import Plan, TrainPlan, check_start_classes, required_cache_bytes
from pipeline.preflight.disk_space import assess_cache_space, assess_clock, assess_disk_space
from pipeline.preflight.finding import Finding, Findings, finding_of_error
from pipeline.preflight.jpeg_decoder import assess_jpeg_decoder
from pipeline.preflight.machine import Machine, assess_machine, this_machine
from pipeline.preflight.memory import assess_memory
from pipeline.preflight.network import assess_interface
from pipeline.preflight.settings import assess_settings
from pipeline.preflight.shards import ShardAssessor, assess_source
from pipeline.preflight.stage_facts import Facts
from pipeline.preflight.unused_settings import unused_settings, unused_shard_settings
from pipeline.preflight.versions import assess_versions
from pipeline.recipe.schema import Recipe, Stage, TrainStage
from pipeline.runs.announcements import class_list
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import run_folder

_GIVE_UP_AFTER = 30.0  # seconds without an answer from remote storage, while a person waits
_CLASSES = 1000  # assumed while the shards are yet to be built


def assess_recipe(
    recipe: Recipe,
    stages: Sequence[str],
    *,
    slurm: bool,
    machine: Machine | None = None,
    extend: bool = False,
    all_nodes: bool = False,
) -> Iterator[Finding]:
    """Check these stages of `recipe` on this machine; with `slurm` they will run as jobs on other machines.

    `machine` replaces what is found out about this one. With `extend`, stages that have begun with other settings are
    to go on with these. With `all_nodes`, jobs
    may run on nodes that computed wrong values, too.

    Raises:
        ConfigError: a stage does not exist.
    """
    for name in stages:
        if name not in recipe.stages:
            raise ConfigError(f"recipe {recipe.name} has no stage {name}; its stages are {', '.join(recipe.stages)}")
    # A wrong setting may be found again with the data.
    where = None if slurm else machine or this_machine()
    yield from dict.fromkeys(_all(_impatient(recipe), stages, where, recipe, extend, all_nodes))


def _all(
    recipe: Recipe, stages: Sequence[str], machine: Machine | None, written: Recipe, extend: bool, all_nodes: bool
) -> Iterator[Finding]:
    """All findings; `machine` is where the stages will run, None for jobs of Slurm.

    `written` is the recipe as a person wrote it.
    """
    slurm = machine is None
    assessor, plans = ShardAssessor(recipe, extend), dict[str, Plan]()
    kept: list[tuple[str, TrainStage, int, int | None]] = []
    caches: list[Cache] = []
    yield from assess_source(recipe)
    yield from unused_shard_settings(written, slurm=slurm)
    if machine is not None:
        yield Finding("ok", "", f"this machine: {machine.text}")
        yield from assess_jpeg_decoder()
    for name in stages:
        stage = recipe.stages[name]
        if machine is not None:
            yield from assess_machine(name, stage, machine)
        yield from assess_settings(recipe, name, elsewhere=slurm)
        found, plan = assessor.assess(name)
        yield from found
        training = plan if isinstance(plan, TrainPlan) else None
        yield from unused_settings(Facts(written, name, training, slurm))
        if plan is not None:
            plans[name] = plan
            yield from _assess_classes(plan, plans.get(stage.start_stage or ""))
        if _has_a_model(recipe, stage):
            yield from _assess_start(recipe, name, plan)
        if plan is not None and not slurm and 0 < (need := _cache_need(plan)) <= plan.cache.bytes:
            caches.append(plan.cache)
            yield assess_cache_space(name, plan.cache, need)
        if isinstance(stage, TrainStage) and _has_a_model(recipe, stage):
            classes = len(plan.classes) if plan else _CLASSES
            begun = bool(run_folder(recipe, name).events.of(Event.SAVE))
            yield from assess_memory(name, stage, classes, begun=begun, machine=machine)
            yield from _assess_place(recipe, name, stage)
            if isinstance(plan, TrainPlan):
                kept.append((name, plan.stage, classes, plan.steps))
            else:
                kept.append((name, stage, classes, stage.steps))
    yield from assess_disk_space(recipe, kept, caches)
    if slurm:
        without = () if all_nodes else faulty_nodes_of(recipe)
        yield from dry_run(recipe, stages, assessor.extended, [node.name for node in without])
    else:
        yield from assess_interface(recipe.stages[name] for name in stages)
    clock = assess_clock(recipe)
    if clock is not None:
        yield clock
    yield from assess_versions()


def _cache_need(plan: Plan) -> int:
    """Bytes of remote shards that a node reads at a time."""
    training = plan if isinstance(plan, TrainPlan) else None
    return required_cache_bytes(plan.stage, plan.stage.resources.ranks, plan.validation, training)


def _assess_classes(plan: Plan, start: Plan | None) -> Findings:
    """Which class list a stage has, and whether it is that of the stage it starts from."""
    found = Findings(plan.name)
    with found.capture():
        if start is not None:
            check_start_classes(plan, start)
        others = start is not None and plan.classes != start.classes
        new = f", others than those of stage {start.name}: it starts with a new classifier" if start and others else ""
        found.ok(f"{class_list(plan.classes)}{new}")
    return found


def _assess_start(recipe: Recipe, name: str, plan: Plan | None) -> Findings:
    """What a stage takes from weights outside of the recipe, as long as it needs them."""
    found, folder = Findings(name), run_folder(recipe, name)
    with found.capture():
        if recipe.stages[name].start_source is None or continues_alone(recipe, name):
            return found
        if plan is None:  # its classes are not known yet
            found.ok(f"start_from: {openable_start(recipe.stages[name], folder)}")
            return found
        beginning = checked_start(plan, folder)
        for line in beginning.announcements(plan) if beginning else ():
            if line.startswith("warning: "):
                found.warning(f"start_from: {line.removeprefix('warning: ')}", "make sure that this is right")
            else:
                found.ok(f"start_from: {line}")
    return found


def _assess_place(recipe: Recipe, name: str, stage: TrainStage) -> Iterator[Finding]:
    """Whether the stage may have its checkpoints where the recipe puts them."""
    folder = run_folder(recipe, name)
    try:
        refuse_foreign_place(checkpoint_store(folder, stage), folder)
    except CoatnetError as error:
        yield finding_of_error(name, error)


def _has_a_model(recipe: Recipe, stage: Stage) -> bool:
    try:
        check_model(recipe, stage, "")
    except ConfigError:
        return False  # reported by the other checks
    return True


def _impatient(recipe: Recipe) -> Recipe:
    """The recipe with a shorter time limit for remote storage."""
    stages = {}
    for name, stage in recipe.stages.items():
        patience = min(stage.data.storage.give_up_after, _GIVE_UP_AFTER)
        storage = stage.data.storage.model_copy(update={"give_up_after": patience})
        stages[name] = stage.model_copy(update={"data": stage.data.model_copy(update={"storage": storage})})
    return recipe.model_copy(update={"stages": stages})
