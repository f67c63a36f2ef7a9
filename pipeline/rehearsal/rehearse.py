"""The rehearsal of a training stage: some of its ranks built on this machine, and all of them by arithmetic."""

import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from data.errors import CoatnetError
from data.limits import RECORD_BYTES
from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.checkpoints.manifest import CheckpointFacts, RunDigests, RunFacts, read_manifest
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError, RunFailed
from pipeline.plan import TrainPlan, check_cache_size, stage_cache
from pipeline.preflight.finding import Finding, Findings, finding_of_error
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import Precision, Recipe, TrainStage
from pipeline.rehearsal.checkpoint_layout import CheckpointLayout, PlannedFile, buffer_layout, kinds_of
from pipeline.rehearsal.cluster_checks import cluster_findings, on_ranks, training_stage
from pipeline.rehearsal.engine_on_fake_tensors import BuiltRank, FakeEngineCase, without_compiler
from pipeline.rehearsal.fake_ranks import build_ranks, check_built
from pipeline.rehearsal.partitions import ModelParameters, Partitioning
from pipeline.rehearsal.record import CheckpointTotals, Consistency, Rehearsal, RehearsedRank
from pipeline.rehearsal.reshape import Reshape, SavedState
from pipeline.rehearsal.sample_shares import AssumedData, StageData, class_names
from pipeline.runs.continuation import computed_with
from pipeline.runs.run_folder import run_folder
from pipeline.training.images import imagenet_preprocessing

_CLASSES = 1000
"""Outputs of the model where neither shards nor assumptions say how many."""
_DIGEST = "0" * 64
_RUN_ID = "0" * 32


def default_ranks(world: int, more: Sequence[int] = ()) -> tuple[int, ...]:
    """The first, a middle and the last rank of `world`, and `more`.

    Raises:
        ConfigError: one is no rank of so many.
    """
    wrong = [rank for rank in more if not 0 <= rank < world]
    if wrong:
        raise ConfigError(f"rank {wrong[0]} is none of {world} ranks; they count from 0 to {world - 1}")
    return tuple(sorted({0, world // 2, world - 1, *more}))


def rehearse(
    recipe: Recipe,
    name: str,
    world: int | None = None,
    ranks: Sequence[int] = (),
    reshape_to: int | None = None,
    assumed: AssumedData | None = None,
) -> Rehearsal:
    """Rehearse stage `name` on one machine, without GPUs, weights or other ranks.

    Args:
        recipe: with the stage.
        name: of a stage that trains.
        world: number of ranks; by default the recipe's.
        ranks: to be built beside the first, the last and one in the middle.
        reshape_to: ranks with which a checkpoint is to be read. By default, if the run has a checkpoint, those of the
            rehearsal.
        assumed: data in place of shards that cannot be read here; without them, what needs shards is left out and an
            error.

    Raises:
        ConfigError: a number of ranks that a start would refuse, an unknown stage, or a model that does not exist.
        RunFailed: DeepSpeed partitions otherwise than this program knows, or a check over all ranks fails.
        StorageDown: remote checkpoints that cannot be reached at present.
    """
    began = time.monotonic()
    world = world or training_stage(recipe, name).resources.ranks
    recipe = on_ranks(recipe, name, world)
    stage = training_stage(recipe, name)
    chosen = default_ranks(world, ranks)
    findings, plan = cluster_findings(recipe, name, assumed)
    data, classes = None, class_names(assumed.classes if assumed else _CLASSES)
    if plan is not None:
        data, classes, stage = StageData.of_plan(plan), plan.classes, plan.stage
    elif assumed is not None:
        data = StageData.assumed(stage, recipe.seed, assumed, f"stage {name}: ")

    model = _model_without_values(stage, len(classes), f"stage {name}: ")
    parameters = ModelParameters.of(model)
    partitionings = {number: Partitioning(parameters, number, world) for number in zero_stages(stage.precision)}
    average = stage.ema_decay is not None
    layout = CheckpointLayout(
        partitionings[stage.zero_stage],
        buffer_layout(model, moving_average=average),
        kinds_of(moving_average=average),
        classes,
    )
    case = FakeEngineCase(without_compiler(stage).model_dump(mode="json"), len(classes), world, chosen)
    (built,) = build_ranks([case])
    for one in built:
        check_built(one, layout, stage.precision)

    files = layout.files()
    manifest = layout.manifest_file(_stand_in_facts(name, stage, len(classes), world, data), files)
    consistency = _consistency(partitionings, data, files, world, len(built))
    reshapes, doubts = _reshapes(recipe, name, layout, files, ranks, reshape_to)
    findings += _manifest_findings(name, manifest)
    if data is not None:
        findings += _cache_findings(name, data, world)
    rehearsed = tuple(_rank(one, stage, world, partitionings, layout, manifest, data) for one in built)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    return Rehearsal(
        recipe=recipe.name,
        stage=name,
        model=stage.model.name,
        precision=stage.precision,
        zero_stage=stage.zero_stage,
        ranks=world,
        nodes=stage.resources.nodes,
        ranks_per_node=stage.resources.ranks_per_node,
        parameters=layout.partitioning.elements,
        micro_batches_per_rank=stage.batch.micro_batches // world,
        data=data.facts if data else None,
        rehearsed=rehearsed,
        checkpoint=_totals(files, manifest),
        cache=data.cache_need(world) if data else None,
        consistency=consistency,
        reshapes=tuple(reshapes),
        findings=tuple(dict.fromkeys([*findings, *doubts])),
        answered=_answered(stage, world, built),
        assumed=_assumed(data, assumed, reshapes),
        seconds=time.monotonic() - began,
        peak_bytes=peak,
    )


def zero_stages(precision: Precision) -> tuple[int, ...]:
    """The ZeRO stages that a recipe may have with `precision`."""
    return (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3)


def _model_without_values(stage: TrainStage, classes: int, where: str) -> CoAtNet:
    """The stage's model on the meta device."""
    model = stage.model
    size, options = stage.resolution, model.options
    try:
        return create_model(model.name, num_classes=classes, image_size=size, device="meta", **options)
    except ValueError as error:
        raise ConfigError(f"{where}model: {error}") from None


def _rank(
    built: BuiltRank,
    stage: TrainStage,
    world: int,
    partitionings: Mapping[int, Partitioning],
    layout: CheckpointLayout,
    manifest: PlannedFile,
    data: StageData | None,
) -> RehearsedRank:
    rank, average = built.rank, stage.ema_decay is not None
    leads = [] if rank else [*layout.leader_files(), manifest]
    return RehearsedRank(
        rank,
        rank // stage.resources.ranks_per_node,
        tuple(each.sizes(rank, stage.precision, moving_average=average) for each in partitionings.values()),
        (layout.rank_file(rank), *leads),
        tuple(data.share(step, rank, world) for step in data.first_and_last) if data else (),
        built.seconds,
        built.peak_bytes,
    )


def _consistency(
    partitionings: Mapping[int, Partitioning],
    data: StageData | None,
    files: Sequence[PlannedFile],
    world: int,
    engines: int,
) -> Consistency:
    owned = {number: each.check_owned_once() for number, each in partitionings.items()}
    seen = {step: data.check_seen_once(step, world) for step in data.first_and_last} if data else {}
    names = Counter(file.name for file in files)
    if len(names) != len(files):
        raise RunFailed(f"rehearsal: {names.most_common(1)[0][0]}: several ranks write it; please report it")
    return Consistency(owned, seen, len(names), engines)


def _totals(files: Sequence[PlannedFile], manifest: PlannedFile) -> CheckpointTotals:
    of_ranks = [file.bytes for file in files if file.name.startswith("rank-")]
    return CheckpointTotals(
        len(files) + 1,
        sum(file.bytes for file in files) + manifest.bytes,
        manifest.fragments,
        min(of_ranks),
        max(of_ranks),
        manifest.bytes,
    )


def _stand_in_facts(name: str, stage: TrainStage, classes: int, world: int, data: StageData | None) -> CheckpointFacts:
    """The facts in a manifest at the end of the stage; texts that only a run knows are as long as usual."""
    model = {"name": stage.model.name, "num_classes": classes, "image_size": stage.resolution, **stage.model.options}
    described = cast(TrainPlan, _Described(stage))
    run = RunFacts(
        name,
        stage.precision,
        model,
        RunDigests(_DIGEST, _DIGEST, _DIGEST),
        _RUN_ID,
        computed_with(described, Ranks(0, world, torch.device("cpu"))),
        imagenet_preprocessing(stage.resolution, stage.data.evaluation_crop),
        stage.loss.kind,
    )
    steps = data.facts.steps if data else stage.steps or 0
    updates = steps if stage.ema_decay is not None else None
    return CheckpointFacts(run, steps, steps * stage.batch.global_size, 0, steps, world, updates)


class _Described:
    """All that `computed_with` asks of a plan; a whole one needs shards."""

    def __init__(self, stage: TrainStage) -> None:
        self.stage = stage


def _manifest_findings(name: str, manifest: PlannedFile) -> list[Finding]:
    """Whether the manifest of a checkpoint would be read again."""
    if manifest.bytes <= RECORD_BYTES:
        return []
    what = (
        f"checkpoints: {manifest.name} would have {manifest.bytes:,} bytes for {manifest.fragments:,} fragments, and "
        f"none of more than {RECORD_BYTES:,} is read"
    )
    return [Finding("error", name, what, "use fewer ranks, or zero_stage=2, with which ranks hold fewer parameters")]


def _cache_findings(name: str, data: StageData, world: int) -> list[Finding]:
    """Whether the cache may hold what a node needs, by made-up shards; those that exist were assessed as such."""
    need, found = data.cache_need(world), Findings(name)
    if need.remote and data.facts.assumed:
        with found.capture():
            check_cache_size(stage_cache(data.stage), need.bytes, "")
            found.ok(f"data.cache.gigabytes: {need.cache_bytes / 1e9:g}, and a node needs {need.bytes / 1e9:.1f} GB")
    return found


def _reshapes(
    recipe: Recipe,
    name: str,
    layout: CheckpointLayout,
    files: Sequence[PlannedFile],
    ranks: Sequence[int],
    reshape_to: int | None,
) -> tuple[list[Reshape], list[Finding]]:
    """What other numbers of ranks read of the run's newest checkpoint, or else of a made-up one."""
    own, parameters = layout.partitioning, layout.partitioning.parameters
    try:
        saved = _newest(recipe, name)
    except CoatnetError as error:
        return [], [finding_of_error(name, error)]
    if saved is None and reshape_to is None:
        return [], []
    saved = saved or SavedState.of_layout(layout, files)
    to = reshape_to or own.ranks
    refused = None
    try:
        on_ranks(recipe, name, to)
    except ConfigError as error:
        refused = str(error)
    shown = default_ranks(to, [rank for rank in ranks if rank < to])
    try:
        reshaped = saved.reshaped(Partitioning(parameters, own.zero_stage, to), shown, refused)
    except ConfigError as error:
        return [], [finding_of_error(name, error)]
    return [reshaped], []


def _newest(recipe: Recipe, name: str) -> SavedState | None:
    """The newest checkpoint of the stage, by its manifest."""
    store = checkpoint_store(run_folder(recipe, name), training_stage(recipe, name))
    steps = store.contents().steps
    if not steps:
        return None
    return SavedState.of_manifest(store.at(steps[0]), read_manifest(store.at(steps[0]), store.storage))


def _answered(stage: TrainStage, world: int, built: Sequence[BuiltRank]) -> tuple[str, ...]:
    """What other ranks and machines would have said."""
    calls: Counter[str] = Counter()
    for one in built:
        calls.update(one.collectives)
    named = ", ".join(f"{count // len(built):,} x {name}" for name, count in calls.most_common())
    found = [
        f"collectives while an engine was built returned at once with what was in the tensor before ({named or 'none'} "
        f"on each rank): no value of another rank arrived, and none was looked at",
        "no step was taken, so nothing was computed or communicated in one, and gradients are counted by formula",
    ]
    if stage.zero_stage == 3:
        kept = built[0].kept_whole
        found.append(
            "in its first step ZeRO 3 asks whether all ranks use the parameters in the same order; nobody was asked. "
            f"It then keeps {kept:,} elements of small parameters whole on every rank, which the sizes leave out"
        )
    if stage.compile or stage.fused_depthwise:
        found.append("blocks were neither compiled nor fused, which changes nothing in what ranks hold")
    found.append(
        "file systems, ports, names of nodes, NCCL and Slurm of the cluster were not asked: coatnet doctor does that "
        "there, and coatnet doctor --nodes on the nodes"
    )
    return tuple(found)


def _assumed(data: StageData | None, assumed: AssumedData | None, reshapes: Sequence[Reshape]) -> tuple[str, ...]:
    """What was made up."""
    found = []
    if data is None:
        found.append(f"without shards the model has {assumed.classes if assumed else _CLASSES:,} classes")
    elif data.facts.assumed and assumed is not None:
        found.append(
            f"{assumed.samples:,} samples of {assumed.classes:,} classes in shards of {assumed.samples_per_shard:,}, "
            f"{assumed.bytes_per_sample:,} bytes each, and {assumed.validation_samples:,} for validation, in place of "
            f"{data.facts.source}, which cannot be read here"
        )
    found += [f"the checkpoint {reshape.source}, as these would save it" for reshape in reshapes if reshape.made_up]
    return tuple(found)
