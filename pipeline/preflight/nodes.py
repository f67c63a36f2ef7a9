"""What the nodes of a stage can do, found out by its ranks: GPUs, exchange, reading and writing."""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from data.errors import DataError, StorageDown
from data.storage import join, remove, upload
from models.complexity import count_parameters
from pipeline.checkpoints.store import checkpoint_store
from pipeline.distributed import Ranks, join_without_gpus, leave_ranks, name_lost_ranks, rank_and_world_size, with_gpus
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals
from pipeline.faults.watchdog import Watchdog
from pipeline.memory_estimate import checkpoint_bytes, estimate_memory
from pipeline.monitoring.progress import StageProgress
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.preflight.assessment import (
    AllReduceFacts,
    NodeFacts,
    RankSpeed,
    ReadFacts,
    StepLoad,
    WriteFacts,
    assess_all_reduce,
    assess_nodes,
    assess_reading,
    assess_writing,
)
from pipeline.preflight.disk_space import existing_parent
from pipeline.preflight.finding import Finding, refusal
from pipeline.preflight.versions import versions
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import WatchdogSettings
from pipeline.run_folder import RunFolder, run_folder
from pipeline.throughput import demand, present_device
from pipeline.training_batches import open_stream

T = TypeVar("T")

_PATIENCE_SECONDS = 180.0
_EXCHANGED = 64 * 2**20  # bytes
_TIMES = 5
_WARM_UP = 2  # micro-batches, and all-reduces
_MOST_WRITTEN = 256 * 2**20  # bytes
_LEAST_WRITTEN = 2**20
_UTILIZATION = 0.4
"""Share of a GPU's peak that training is taken to reach, as in docs/recipes.md."""


def assess_nodes_as_rank(
    recipe: Recipe, name: str, folder: RunFolder, report: Path, seconds: float, signals: StopSignals
) -> None:
    """As one rank of stage `name`: find out, and have the leader write what is found into `report`, a line at a time.

    Args:
        recipe: with the stage.
        name: of the stage.
        folder: for logs.
        report: JSON lines, each a `Finding`; the last one is empty.
        seconds: how long readers run.
        signals: of this process.

    Raises:
        LostRank: another rank is gone.
    """
    rank, world_size = rank_and_world_size()
    folder.logs.mkdir(parents=True, exist_ok=True)
    log_file = folder.log_file(rank)

    def end(code: int, message: str) -> NoReturn:
        signals.end(code, message.partition(". The same command")[0])

    patience = _PATIENCE_SECONDS + seconds
    settings = WatchdogSettings(setup_seconds=patience, least_seconds=patience)
    with name_lost_ranks(), Watchdog(settings, rank, world_size, log_file, end) as watchdog:
        ranks = join_without_gpus()
        watchdog.joined()
        plan, machine = _machine(recipe, name, ranks)
        stage, node = recipe.stages[name], machine.node
        machines = _gathered(ranks, machine)
        training = plan if isinstance(plan, TrainPlan) else None
        if ranks.is_leader:
            needed = estimate_memory(training.stage, len(training.classes), world_size).device if training else None
            _tell(ranks, report, assess_nodes(name, machines, stage.resources, stage.data, needed))
        load = _load(training, run_folder(recipe, name), world_size) if training else None
        if world_size > 1:
            with watchdog.section("all-reduce"):
                # Where a GPU is missing on one rank, none of them waits for it in NCCL.
                on_gpus = all(machine.gpu for machine in machines)
                exchanges = _gathered(ranks, _exchange(ranks, node, on_gpus))
            _tell(ranks, report, assess_all_reduce(name, exchanges, load))
        if all(machine.problem is None for machine in machines) and training is not None and load is not None:
            with watchdog.section("reading"):
                readings = _gathered(ranks, _read(ranks, node, training, seconds))
            _tell(ranks, report, assess_reading(name, readings, load))
            with watchdog.section("writing"):
                writings = _gathered(ranks, _write(ranks, node, training, run_folder(recipe, name), load))
            _tell(ranks, report, assess_writing(name, writings, load))
        _tell(ranks, report, None)
        ranks.barrier()
    leave_ranks()


def read_report(report: Path) -> tuple[list[Finding], bool]:
    """What the leader has written so far, and whether that is all."""
    found: list[Finding] = []
    with suppress(FileNotFoundError):
        for line in report.read_text().splitlines():
            with suppress(ValueError):  # half a line
                content = json.loads(line)
                if not content:
                    return found, True
                found.append(Finding(**content))
    return found, False


def _tell(ranks: Ranks, report: Path, findings: Sequence[Finding] | None) -> None:
    if ranks.is_leader:
        lines = [{}] if findings is None else [asdict(finding) for finding in findings]
        with open(report, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def _gathered(ranks: Ranks, fact: T) -> list[T]:
    """What all ranks found out, in their order, on every rank."""
    kind, texts = type(fact), ranks.gather_texts(json.dumps(asdict(fact)))  # type: ignore[call-overload]
    return [kind(**json.loads(text)) for text in texts]


def _machine(recipe: Recipe, name: str, ranks: Ranks) -> tuple[Plan | None, NodeFacts]:
    """The plan of the stage, None where it cannot start, and what this rank sees."""
    plan: Plan | None = None
    problem: Finding | None = None
    local_rank = int(os.environ["LOCAL_RANK"])
    try:
        # The shards are looked for by one rank of each node.
        plan = plan_stage(recipe, name, ranks.world_size, look_at_shards=local_rank == 0)
    except (ConfigError, DataError, StorageDown) as error:
        problem = refusal(name, error)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = local_rank < gpus
    free, total = torch.cuda.mem_get_info(local_rank) if own else (0, 0)
    ranks.barrier()
    return plan, NodeFacts(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        gpu=torch.cuda.get_device_name(local_rank) if own else None,
        gpus=gpus,
        gpu_bytes=total,
        gpu_free=free,
        processors=len(os.sched_getaffinity(0)),
        time=time.time(),
        versions=versions(),
        problem=problem.what if problem else None,
        fix=problem.fix if problem else "",
    )


def _load(plan: TrainPlan, folder: RunFolder, world_size: int) -> StepLoad:
    stage = plan.stage
    parameters = count_parameters(stage.model.variant, stage.resolution, len(plan.classes))
    return StepLoad(
        images=stage.batch.global_size,
        gradient_bytes=4 * parameters,
        checkpoint_bytes=checkpoint_bytes(stage, parameters),
        every_steps=stage.checkpoint.every_steps,
        pace=_pace(plan, folder, world_size),
    )


def _pace(plan: TrainPlan, folder: RunFolder, world_size: int) -> RankSpeed | None:
    """From an earlier start, else from the GPU's peak; None where neither is known."""
    before = StageProgress.read(folder.progress)
    if before is not None and before.images_per_second > 0:
        return RankSpeed(before.images_per_second / world_size, "as in an earlier start")
    device = present_device()
    if device is None:
        return None
    return RankSpeed(demand(plan.stage, device, _UTILIZATION), f"{device} at {_UTILIZATION:.0%} of its peak")


def _exchange(ranks: Ranks, node: str, on_gpus: bool) -> AllReduceFacts:
    try:
        among = with_gpus(ranks, torch.device("cuda", int(os.environ["LOCAL_RANK"]))) if on_gpus else ranks
        tensor = torch.zeros(_EXCHANGED // 4, device=among.device)
        began = 0.0
        for number in range(_WARM_UP + _TIMES):
            if number == _WARM_UP:
                _synchronize(among.device)
                ranks.barrier()
                began = time.monotonic()
            among.sum(tensor)
        _synchronize(among.device)
        return AllReduceFacts(node, _EXCHANGED, (time.monotonic() - began) / _TIMES)
    except RuntimeError as error:
        if not on_gpus:
            raise  # what ranks tell each other goes the same way
        logging.getLogger(__name__).exception("all-reduce")
        return AllReduceFacts(node, _EXCHANGED, 0.0, str(error).strip().partition("\n")[0])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(ranks: Ranks, node: str, plan: TrainPlan, seconds: float) -> ReadFacts:
    """Micro-batches of this rank's share as training reads them, while all other ranks do."""
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
    """A file as large as this rank's part of a checkpoint, to where that will lie."""
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
