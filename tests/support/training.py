"""Trains a stage in the rank processes of a test, without the `coatnet` command."""

from typing import NoReturn

from rich.console import Console

from pipeline.faults.preemption import StopRequests, StopSignals
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.run_folder import RunFolder
from pipeline.train import train
from pipeline.training.training_run import RunContext


def train_here(
    plan: TrainPlan,
    folder: RunFolder,
    ranks: Ranks,
    start_from: str | None = None,
    signals: StopSignals | None = None,
    node: str = "node",
) -> None:
    """Train `plan` in `folder`, with this process as a rank of the run on `node`; `signals` may ask it to stop."""
    folder.create()
    log_file = folder.log_file(ranks.rank)
    watchdog = Watchdog(plan.stage.watchdog, ranks.rank, ranks.world_size, node, log_file, end_here)
    requests = StopRequests(signals or StopSignals(end_here), plan.stage.checkpoint.grace_seconds)
    console = Console() if ranks.is_leader else None
    train(plan, RunContext(folder, ranks, console, requests, watchdog, node=node), start_from)


def end_here(code: int, message: str) -> NoReturn:
    """End this process, as a rank's `EndProcess` does."""
    raise SystemExit(f"{code}: {message}")
