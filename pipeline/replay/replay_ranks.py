"""The ranks of a replay: how they join, what they share, and the state that they agree to begin with."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.files.json_records import parse_json, to_json
from pipeline.errors import ConfigError
from pipeline.faults.preemption import EndProcess
from pipeline.faults.watchdog import Watchdog
from pipeline.initial_weights.start import fitted_start
from pipeline.plan import TrainPlan, check_ranks
from pipeline.ranks.device_settings import prepare_devices
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks, name_lost_ranks
from pipeline.ranks.rendezvous import read_rendezvous
from pipeline.recipe.schema import TrainStage
from pipeline.recipe.sections import WatchdogSettings
from pipeline.replay.observation import ObservedModel
from pipeline.replay.recorded_stage import RecordedStage
from pipeline.replay.run_checkpoint import REMOVED, is_removed, naming_removal, run_checkpoint
from pipeline.replay.start_points import ReplayStart
from pipeline.runs.run_folder import RunFolder
from pipeline.weights import build_model, persistent_buffers


@contextmanager
def rank_of_replay(
    recorded: RecordedStage, out: Path, node: str, end: EndProcess, *, bisects: bool = False
) -> Iterator[tuple[Ranks, Watchdog]]:
    """This process as a rank that computes as those of the recorded stage, under a watchdog; logs are in `out`."""
    stage = recorded.stage
    on_gpus = stage.resources.gpus_per_rank > 0
    found = read_rendezvous(os.environ)
    prepare_devices(gpus=on_gpus, deterministic=stage.deterministic)
    log_file, limits = RunFolder(out).log_file(found.rank), patience(stage, bisects=bisects)
    with name_lost_ranks(), Watchdog(limits, found.rank, found.world_size, node, log_file, end) as watchdog:
        ranks = join_ranks(stage.resources.threads_per_rank, gpus=on_gpus)
        watchdog.listen()
        check_ranks(stage, ranks.world_size, f"stage {recorded.name}: ")
        yield ranks, watchdog
        ranks.barrier()
    leave_ranks()


def patience(stage: TrainStage, *, bisects: bool) -> WatchdogSettings:
    """The limits of a replay: looking into a step takes longer than the step, and no section is like the one before.

    A search for samples repeats each micro-batch for every second sample or more often, while the other ranks wait.
    """
    setup = stage.watchdog.setup_seconds
    return WatchdogSettings(setup_seconds=setup, least_seconds=setup * (stage.batch.micro_size if bisects else 1))


def begin_with(
    starts: Sequence[ReplayStart], ranks: Ranks, begin: Callable[[ReplayStart], None]
) -> tuple[ReplayStart, list[str]]:
    """Call `begin` with the nearest of the leader's `starts` that is intact; returns it, and why others were not.

    Raises:
        ConfigError: none is intact.
        CheckpointRemoved: the run has removed the checkpoint that was being read.
    """
    passed_over = list[str]()
    for position in range(ranks.broadcast(len(starts))):
        text = json.dumps(to_json(starts[position])) if ranks.is_leader else ""
        start = parse_json(ReplayStart, ranks.broadcast_text(0, text))
        try:
            with naming_removal(start.location):
                begin(start)
        except ConfigError as error:
            passed_over.append(f"{start.location}: {REMOVED}" if is_removed(start.location) else str(error))
            continue
        return start, passed_over
    raise ConfigError(f"no state to recompute the step from is intact: {'; '.join(passed_over)}")


def load_into(
    model: ObservedModel, start: ReplayStart, recorded: RecordedStage, plan: TrainPlan, ranks: Ranks, scratch: Path
) -> None:
    """The weights and buffers of `start` without an engine.

    Raises:
        ConfigError: its checkpoint is damaged, or of another recipe or other data.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    if start.location is not None:
        with run_checkpoint(start.location, plan, ranks, scratch) as checkpoint:
            try:
                model.load(checkpoint.parameters(), checkpoint.buffers())
            except ValueError as error:
                raise ConfigError(f"{checkpoint.location}: {error}; it holds another model's state") from None
    elif (location := recorded.starting_weights()) is not None:
        beginning = build_model(plan)
        fitted_start(plan, location, recorded.folder, beginning, ranks, scratch).fill(beginning)
        model.load(dict(beginning.named_parameters()), persistent_buffers(beginning))


@contextmanager
def scratch_folder(out: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder that all ranks see, removed afterwards."""
    folder = out / ".scratch"
    if ranks.is_leader:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        folder.mkdir(parents=True)
    ranks.barrier()
    yield folder
    ranks.barrier()
    if ranks.is_leader:
        shutil.rmtree(folder, ignore_errors=True)
