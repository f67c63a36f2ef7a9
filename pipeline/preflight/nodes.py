"""What the nodes of a stage can do, found out by its ranks: GPUs, all-reduce, equal bits, reading and writing."""

import json
import logging
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch

from data.errors import DataError, StorageDown
from data.remote.storage import join, remove, upload
from models.complexity import count_parameters
from pipeline.burn_in.repetitions import burn_in
from pipeline.burn_in.verdict import DeviceBits
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals
from pipeline.faults.watchdog import Watchdog
from pipeline.memory_estimate import estimate_memory
from pipeline.monitoring.progress import StageProgress
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.planner.step_estimate import computing_speed
from pipeline.preflight.assessment import (
    AllReduceFacts,
    NodeFacts,
    RankSpeed,
    ReadFacts,
    StepLoad,
    WriteFacts,
    assess_all_reduce,
    assess_burn_in,
    assess_nodes,
    assess_reading,
    assess_writing,
    not_compared,
)
from pipeline.preflight.disk_space import existing_parent
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.preflight.report import append_to_report, finish_report
from pipeline.preflight.versions import versions
from pipeline.ranks.communication_errors import short_reason
from pipeline.ranks.device_settings import gpu_of_rank, prepare_devices
from pipeline.ranks.distributed import Ranks, join_without_gpus, leave_ranks, name_lost_ranks, with_gpus
from pipeline.ranks.gpus import present_gpu
from pipeline.ranks.rendezvous import check_interface, read_rendezvous
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import WatchdogSettings
from pipeline.runs.run_folder import RunFolder, run_folder
from pipeline.state_bytes import checkpoint_bytes
from pipeline.training.training_batches import open_stream

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

_LIMIT_SECONDS = 180.0  # of the watchdog
_ALL_REDUCE_BYTES = 64 * 2**20
_ALL_REDUCES = 5
_WARM_UP = 2  # all-reduces, and micro-batches
_MOST_WRITTEN = 256 * 2**20  # bytes
_LEAST_WRITTEN = 2**20


def run_node_checks(
    recipe: Recipe, name: str, folder: RunFolder, report: Path, seconds: float, signals: StopSignals, node: str
) -> None:
    """Run the checks as one rank of stage `name`; the leader appends the findings to `report` as they are made.

    Args:
        recipe: with the stage.
        name: of the stage.
        folder: for logs.
        report: see `read_report`.
        seconds: how long the burn-in lasts, and after it the readers.
        signals: of this process.
        node: name of this machine.

    Raises:
        LostRank: another rank is gone.
    """
    found = read_rendezvous(os.environ)
    rank, world_size = found.rank, found.world_size
    folder.logs.mkdir(parents=True, exist_ok=True)

    def end(code: int, message: str) -> NoReturn:
        signals.end(code, message.partition(". The same command")[0])

    limit = _LIMIT_SECONDS + seconds
    settings = WatchdogSettings(setup_seconds=limit, least_seconds=limit)
    stage = recipe.stages[name]
    prepare_devices(gpus=stage.resources.gpus_per_rank > 0, deterministic=stage.deterministic)
    with name_lost_ranks(), Watchdog(settings, rank, world_size, node, folder.log_file(rank), end) as watchdog:
        checks = _NodeChecks(join_without_gpus(), node, watchdog, report)
        watchdog.listen()
        plan, nodes = checks.nodes(recipe, name)
        load = _load(plan, run_folder(recipe, name), world_size) if isinstance(plan, TrainPlan) else None
        if world_size > 1 and all(fact.has_interface for fact in nodes):
            # If a GPU is missing on one rank, the others must not wait for it in NCCL.
            checks.all_reduce(name, load, on_gpus=all(fact.gpu for fact in nodes))
        if isinstance(plan, TrainPlan) and load is not None and all(fact.problem is None for fact in nodes):
            if all(fact.gpu for fact in nodes) or not stage.resources.gpus_per_rank:
                checks.burn_in(plan, seconds)
            checks.reading(plan, load, seconds)
            checks.writing(plan, load, run_folder(recipe, name))
        if checks.ranks.is_leader:
            finish_report(report)
        checks.ranks.barrier()
    leave_ranks()


@dataclass(frozen=True, slots=True)
class _NodeChecks:
    """The checks; all ranks call them in the same order."""

    ranks: Ranks
    node: str
    watchdog: Watchdog
    report: Path

    def nodes(self, recipe: Recipe, name: str) -> tuple[Plan | None, list[NodeFacts]]:
        """Check what each rank sees of its node; returns the plan, None if the stage cannot start, and the facts."""
        plan, fact = _inspect_node(recipe, name, self.ranks, self.node)
        facts, stage = _gather(self.ranks, fact), recipe.stages[name]
        needed = None
        if isinstance(plan, TrainPlan):
            needed = estimate_memory(plan.stage, len(plan.classes), self.ranks.world_size).device
        self._report(assess_nodes(name, facts, stage.resources, stage.data, needed))
        return plan, facts

    def all_reduce(self, name: str, load: StepLoad | None, *, on_gpus: bool) -> None:
        """Measure an all-reduce between all ranks."""
        with self.watchdog.section("all-reduce"):
            facts = _gather(self.ranks, _time_all_reduce(self.ranks, self.node, on_gpus))
        self._report(assess_all_reduce(name, facts, load))

    def burn_in(self, plan: TrainPlan, seconds: float) -> None:
        """Compute the same micro-batch on all ranks at once, again and again."""
        if plan.stage.resources.gpus_per_rank and not plan.stage.deterministic:
            self._report([not_compared(plan.name)])
            return
        with self.watchdog.section("burn-in"):
            facts = _gather(self.ranks, _burn_in(self.ranks, self.node, plan, seconds))
        self._report(assess_burn_in(plan.name, facts))

    def reading(self, plan: TrainPlan, load: StepLoad, seconds: float) -> None:
        """Read micro-batches on all ranks at once."""
        with self.watchdog.section("reading"):
            facts = _gather(self.ranks, _read(self.ranks, self.node, plan, seconds))
        self._report(assess_reading(plan.name, facts, load))

    def writing(self, plan: TrainPlan, load: StepLoad, folder: RunFolder) -> None:
        """Write a file on all ranks at once to where checkpoints are stored."""
        with self.watchdog.section("writing"):
            facts = _gather(self.ranks, _write(self.ranks, self.node, plan, folder, load))
        self._report(assess_writing(plan.name, facts, load))

    def _report(self, findings: Sequence[Finding]) -> None:
        if self.ranks.is_leader:
            append_to_report(self.report, findings)


def _gather(ranks: Ranks, fact: "T") -> "list[T]":
    """The facts of all ranks, in rank order, on every rank."""
    kind = type(fact)
    return [kind(**json.loads(text)) for text in ranks.gather_texts(json.dumps(asdict(fact)))]


def _inspect_node(recipe: Recipe, name: str, ranks: Ranks, node: str) -> tuple[Plan | None, NodeFacts]:
    """The plan of the stage, None if it cannot start here, and what this rank sees of its node."""
    plan: Plan | None = None
    problem: Finding | None = None
    has_interface = True
    local_rank = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = _gpu_number(gpus)
    has_gpu = number is not None
    try:
        # One rank of each node looks for the shards.
        plan = plan_stage(recipe, name, ranks.world_size, look_at_shards=local_rank == 0)
    except (ConfigError, DataError, StorageDown) as error:
        problem = finding_of_error(name, error)
    try:
        if has_gpu:
            check_interface("nccl")
    except ConfigError as error:
        problem, has_interface = finding_of_error(name, error), False
    free, total = torch.cuda.mem_get_info(number) if has_gpu else (0, 0)
    ranks.barrier()
    return plan, NodeFacts(
        node=node,
        gpu=torch.cuda.get_device_name(number) if has_gpu else None,
        gpus=gpus,
        gpu_bytes=total,
        gpu_free=free,
        processors=len(os.sched_getaffinity(0)),
        time=time.time(),
        versions=versions(),
        problem=problem.what if problem else None,
        fix=problem.fix if problem else "",
        has_interface=has_interface,
    )


def _gpu_number(gpus: int) -> int | None:
    """The GPU of this rank among those that it sees; None if there is none for it."""
    try:
        return gpu_of_rank(int(os.environ["LOCAL_RANK"]), gpus, os.environ, "")
    except ConfigError:
        return None


def _load(plan: TrainPlan, folder: RunFolder, world_size: int) -> StepLoad:
    stage = plan.stage
    parameters = count_parameters(stage.model.variant, stage.resolution, len(plan.classes))
    return StepLoad(
        images=stage.batch.global_size,
        gradient_bytes=4 * parameters,
        checkpoint_bytes=checkpoint_bytes(stage, parameters),
        every_steps=stage.checkpoint.interval,
        pace=_pace(plan, folder, world_size),
    )


def _pace(plan: TrainPlan, folder: RunFolder, world_size: int) -> RankSpeed | None:
    """From an earlier start, or else by the planner's estimate for the GPU; None if its kind is not known."""
    before = StageProgress.read(folder.progress)
    if before is not None and before.images_per_second:
        return RankSpeed(before.images_per_second / world_size, "as in an earlier start")
    device = present_gpu()
    if device is None:
        return None
    speed = computing_speed(plan.stage, len(plan.classes), device)
    return RankSpeed(speed.value, f"{device} by estimate, from {speed.least:,.0f} to {speed.most:,.0f} on each rank")


def _time_all_reduce(ranks: Ranks, node: str, on_gpus: bool) -> AllReduceFacts:
    try:
        number = _gpu_number(torch.cuda.device_count()) if on_gpus else None
        group = ranks if number is None else with_gpus(ranks, torch.device("cuda", number))
        tensor = torch.zeros(_ALL_REDUCE_BYTES // 4, device=group.device)
        began = 0.0
        for number in range(_WARM_UP + _ALL_REDUCES):
            if number == _WARM_UP:
                _synchronize(group.device)
                ranks.barrier()
                began = time.monotonic()
            group.sum(tensor)
        _synchronize(group.device)
        return AllReduceFacts(node, _ALL_REDUCE_BYTES, (time.monotonic() - began) / _ALL_REDUCES)
    except RuntimeError as error:
        if not on_gpus:
            raise  # the ranks exchange their facts the same way, so nothing could be reported
        logging.getLogger(__name__).exception("all-reduce")
        return AllReduceFacts(node, _ALL_REDUCE_BYTES, 0.0, short_reason(error))


def _burn_in(ranks: Ranks, node: str, plan: TrainPlan, seconds: float) -> DeviceBits:
    number = _gpu_number(torch.cuda.device_count()) if plan.stage.resources.gpus_per_rank else None
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    ranks.barrier()  # so that all of them are hot together
    return burn_in(plan, device, where=f"rank {ranks.rank} on {node}", node=node, seconds=seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(ranks: Ranks, node: str, plan: TrainPlan, seconds: float) -> ReadFacts:
    """Read micro-batches of this rank's share as training does, while all other ranks do the same."""
    images = skipped = 0
    problem = None
    began = ended = time.monotonic()
    with closing(open_stream(plan, ranks.rank, ranks.world_size, 0)) as stream:
        try:
            for _ in range(_WARM_UP):
                next(stream)
        except (DataError, StorageDown) as error:
            problem = str(error)
        ranks.barrier()
        began = time.monotonic()
        try:
            while problem is None and time.monotonic() < began + seconds:
                batch = next(stream)
                images += len(batch.labels)
                skipped += len(batch.skipped)
        except (DataError, StorageDown) as error:
            problem = str(error)
        ended = time.monotonic()
    return ReadFacts(node, images, max(1e-9, ended - began), skipped, problem)


def _write(ranks: Ranks, node: str, plan: TrainPlan, folder: RunFolder, load: StepLoad) -> WriteFacts:
    """Write a file as large as this rank's part of a checkpoint to where checkpoints will be stored."""
    place = checkpoint_store(folder, plan.stage)
    size = min(_MOST_WRITTEN, max(_LEAST_WRITTEN, load.checkpoint_bytes // ranks.world_size))
    name = f".doctor-{uuid.uuid4().hex}"
    home = existing_parent(place.scratch if place.remote else Path(place.location))
    file = home / name
    content = os.urandom(min(size, 2**20)) * -(-size // 2**20)
    ranks.barrier()
    began = time.monotonic()
    try:
        with open(file, "wb") as opened:
            opened.write(content[:size])
            opened.flush()
            os.fsync(opened.fileno())
        if place.remote:
            began = time.monotonic()
            upload(file, join(place.location, name), place.storage)
        seconds = time.monotonic() - began
        if place.remote:
            remove(join(place.location, name), place.storage)
        return WriteFacts(node, size, max(1e-9, seconds))
    except (OSError, DataError, StorageDown) as error:
        return WriteFacts(node, size, 0.0, str(error))
    finally:
        with suppress(OSError):
            file.unlink()
