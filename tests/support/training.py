"""Training a stage inside a test's own rank processes, without the command around it."""

from typing import NoReturn

from rich.console import Console

from pipeline.distributed import Ranks
from pipeline.faults.preemption import StopRequests, StopSignals
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import TrainPlan
from pipeline.run_folder import RunFolder
from pipeline.train import train
from pipeline.training_run import RunContext


def train_here(
    plan: TrainPlan,
    folder: RunFolder,
    ranks: Ranks,
    start_from: str | None = None,
    signals: StopSignals | None = None,
) -> None:
    """Train `plan` into `folder` as the rank that this process is; `signals` may ask it to stop."""
    folder.create()
    log_file = folder.log_file(ranks.rank)
    watchdog = Watchdog(plan.stage.watchdog, ranks.rank, ranks.world_size, "node", log_file, _end)
    requests = StopRequests(signals or StopSignals(_end), plan.stage.checkpoint.grace_seconds)
    train(plan, RunContext(folder, ranks, Console() if ranks.is_leader else None, requests, watchdog), start_from)


def _end(code: int, message: str) -> NoReturn:
    raise SystemExit(f"{code}: {message}")
