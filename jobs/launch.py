"""The ranks of a stage as processes of this machine: started, stopped and ended together."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType

from data.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MACHINE_FAULTY, EXIT_TRY_AGAIN
from data.files.child_process import end_with_parent, own_packages_first, python_module
from data.files.json_records import parse_json
from jobs.exit_codes import OUTCOME_FILE, Outcome, StageFailed
from pipeline.errors import ConfigError, stop_exit_code
from pipeline.faults.preemption import STOP_SIGNALS, ReceivedSignals, StopSignals
from pipeline.host import out_of_memory_kills, this_host
from pipeline.ranks.rendezvous import LAUNCHER, STORE_FOLDER
from pipeline.recipe.schema import Stage, TrainStage
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.run_folder import RunFolder

_STARTED = "COATNET_STARTED"
_LEAVE_SECONDS = 10
"""After one rank has failed, time for the others to notice and report what they know; then they are killed."""
_SLACK_SECONDS = 30
"""Ranks that were asked to stop end by themselves within checkpoint.grace_seconds; this long after that, they hang."""
_POLL_SECONDS = 0.05
_MEMORY = "/dev/shm"  # noqa: S108
"""The ranks meet in a file that they lock, which not every file system of a TMPDIR allows."""
_TAIL = 16384  # bytes of a log
_SAID = "error: "
"""How a line begins that a rank prints where it cannot report its outcome."""


def refuse_other_machines(name: str, stage: Stage) -> None:
    """Refuse a stage for several machines: only a part of its ranks would start here.

    Raises:
        ConfigError: it names the fix.
    """
    nodes, ranks = stage.resources.nodes, stage.resources.ranks
    if nodes > 1:
        raise ConfigError(
            f"stage {name}: resources.nodes is {nodes}, but this command starts ranks on one machine; submit the stage "
            f"to Slurm, start `coatnet train` on every node with torchrun, or set resources.nodes=1 "
            f"resources.ranks={ranks // nodes}"
        )


def launch_ranks(
    command: list[str],
    stage: Stage,
    folder: RunFolder,
    signals: StopSignals,
    variables: Mapping[str, str] = MappingProxyType({}),
    memory_advice: Callable[[], str] = lambda: "",
) -> None:
    """Run `coatnet COMMAND` as the ranks of `stage`, with `variables` in their environment, and wait for them.

    If the kernel kills one for lack of memory, the message ends with `memory_advice`.

    Rank 0 prints to this process's standard output; everything else goes to the logs of the ranks. If one rank fails,
    the others are ended. A signal to stop is passed on to the ranks, which get time to save; a second one ends them at
    once. If this process dies, whatever the reason, they die with it.

    Each rank has a process group of its own, so that what a terminal sends to the foreground group arrives here alone:
    it is counted once, and does not kill the compilers that a rank runs. Ctrl-Z is passed on, too.

    Raises:
        StageFailed: with the outcome of the rank that caused the failure.
    """
    grace = stage.checkpoint.grace_seconds if isinstance(stage, TrainStage) else 0.0
    begun = len(folder.events.of(Event.BEGIN))
    group = RankGroup(
        stage.resources.ranks,
        stage.resources.threads_per_rank,
        folder.log_file,
        grace,
        on_interrupt=lambda first: _record_interrupt(folder.events, first, begun),
        memory_advice=memory_advice,
    )
    launch_group(command, group, signals, variables)


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks that a command starts together."""

    count: int
    threads: int
    """Compute threads of each."""
    log_file: Callable[[int], Path]
    """The log of a rank; its folder exists."""
    grace_seconds: float = 0.0
    """The time that they may take to save after a signal to stop."""
    on_interrupt: Callable[[signal.Signals], None] = lambda first: None
    """Called with the first signal when a second one has ended them at once."""
    memory_advice: Callable[[], str] = lambda: ""
    """Ends the message if the kernel has killed one for lack of memory."""


def launch_group(
    command: list[str],
    group: RankGroup,
    signals: StopSignals,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """As `launch_ranks`, for ranks that are not those of a stage.

    Raises:
        StageFailed: with the outcome of the rank that caused the failure.
    """
    signals.exit_if_signalled()  # a signal after the previous stage had ended
    processes: list[subprocess.Popen[bytes]] = []
    received = ReceivedSignals()
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    kills = out_of_memory_kills()

    def pass_on(stop: signal.Signals) -> None:
        if received.add(stop):
            for process in processes:
                process.send_signal(stop)

    with (
        # In memory: a full disk must not keep a rank from saying that the disk is full.
        tempfile.TemporaryDirectory(prefix="coatnet-", dir=memory) as outcomes,
        tempfile.TemporaryDirectory(prefix="coatnet-", dir=memory) as store,
        _suspended_together(processes),
    ):
        signals.set_handler(pass_on)
        try:
            own = {_STARTED: str(signals.started), LAUNCHER: str(os.getpid()), STORE_FOLDER: store, **variables}
            _start(processes, command, group, Path(outcomes), own)
            if received.first is not None:  # while only some of the ranks had been started
                for process in processes:
                    process.send_signal(received.first)
            codes = _wait(processes, received, group.grace_seconds + _SLACK_SECONDS)
        except BaseException:
            _kill(processes, 0)
            raise
        finally:
            signals.set_handler(None)
        if any(codes) or None in codes:
            _kill(processes, 0)
            if received.first is not None and received.second is not None and None in codes:
                group.on_interrupt(received.first)
            advice = group.memory_advice if out_of_memory_kills() != kills else None
            raise StageFailed(_outcome(codes, Path(outcomes), group, received, signals.if_repeated(), advice))


def _record_interrupt(events: EventLog, first: signal.Signals, begun: int) -> None:
    """Record that ranks were killed at a person's wish, if theirs is a start beyond the `begun` of before: it does not
    count as one without progress."""
    if len(events.of(Event.BEGIN)) > begun:
        events.record(Event.STOP, reason=first.name, at_once=True)


def die_with_launcher() -> None:
    """In a rank: let the kernel kill this process when the launcher dies, so that no rank keeps training unnoticed."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # rank 0 writes to a terminal whose foreground group it is not in
    end_with_parent(int(launcher), EXIT_INTERRUPTED)


def is_rank() -> bool:
    """Whether this process was started as one rank of a group."""
    return "RANK" in os.environ


def started_at(moment: float) -> dict[str, str]:
    """The environment of ranks whose start counts from `moment` rather than from when the command began."""
    return {_STARTED: str(moment)}


def launch_time(own_start: float) -> float:
    """When this start of the stage began, in seconds since the epoch; `own_start` if nothing launched this rank."""
    return float(os.environ.get(_STARTED, own_start))


def _start(
    processes: list[subprocess.Popen[bytes]],
    command: list[str],
    group: RankGroup,
    outcomes: Path,
    variables: Mapping[str, str],
) -> None:
    """Start the ranks and append their processes to `processes`."""
    for rank in range(group.count):
        environment = (
            os.environ
            | own_packages_first()
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(group.count),
                "LOCAL_WORLD_SIZE": str(group.count),
                "OMP_NUM_THREADS": str(group.threads),
                OUTCOME_FILE: f"{outcomes}/{rank}.json",
            }
            | dict(variables)
        )
        with open(group.log_file(rank), "ab") as output, _blocked_signals():
            processes.append(
                subprocess.Popen(
                    # -P: a models.py in the working directory is not ours.
                    python_module("jobs", *command),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else output,
                    stderr=output,
                    process_group=0,
                )
            )


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Processes started inside get the stop signals once they can handle them: `StopSignals` unblocks them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _suspended_together(processes: Iterable[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside, Ctrl-Z suspends `processes` as well, until this process continues."""

    def suspend(_number: int, _frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in processes:  # once SIGCONT has arrived
            process.send_signal(signal.SIGCONT)

    before = signal.getsignal(signal.SIGTSTP)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _wait(processes: list[subprocess.Popen[bytes]], received: ReceivedSignals, stop_seconds: float) -> list[int | None]:
    """Wait until all have ended; returns their exit codes, with None for processes that must be killed.

    Those are ranks that still run `_LEAVE_SECONDS` after another one has failed, `stop_seconds` after the first signal
    to stop, or at the second.
    """
    failed = None
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        if failed is None and any(codes):
            failed = now
        overdue = failed is not None and now - failed > _LEAVE_SECONDS
        if None not in codes or overdue or received.second or received.seconds > stop_seconds:
            return codes
        time.sleep(_POLL_SECONDS)


def _kill(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Kill the processes that do not end by themselves within `seconds`, and the compilers that they have started."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def _outcome(
    codes: list[int | None],
    outcomes: Path,
    group: RankGroup,
    received: ReceivedSignals,
    if_repeated: str,
    memory_advice: Callable[[], str] | None = None,
) -> Outcome:
    """The outcome of the rank that caused the failure: when one rank fails, others fail because it is gone.

    `if_repeated` is what the same command does when it is given again; there is `memory_advice` if the kernel has
    killed a process for lack of memory meanwhile.
    """
    first, second = received.first, received.second
    if first is not None and second is not None and None in codes:
        why = f"a second signal, {second.name}, ended it at once"
        return Outcome(stop_exit_code(first.name), f"stopped by {first.name}; {why}; {if_repeated}")
    written = {}
    for rank in range(len(codes)):
        try:
            written[rank] = parse_json(Outcome, (outcomes / f"{rank}.json").read_bytes())
        except (OSError, ValueError):
            continue
    # First of all, since values of a machine that computes wrong ones may be why another rank failed.
    for code in (EXIT_MACHINE_FAULTY, EXIT_CONFIG, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_INTERRUPTED):
        for outcome in written.values():
            if outcome.code == code and not outcome.is_consequence:
                return outcome
    killed = {rank: signal.Signals(-code) for rank, code in enumerate(codes) if code is not None and code < 0}
    for rank, name in killed.items():
        if name == signal.SIGKILL and memory_advice is not None:
            full = f"rank {rank} was killed by the kernel because the memory is full ({this_host().text})"
            return Outcome(128 + name, f"{full}; {if_repeated}. {memory_advice()}".rstrip())
        if name not in STOP_SIGNALS:
            return Outcome(
                128 + name,
                f"rank {rank} was killed by {name.name}, by a person or for lack of memory; {if_repeated}",
            )
    if killed:
        # They had not yet installed their signal handlers.
        name = next(iter(killed.values()))
        return Outcome(stop_exit_code(name.name), f"stopped by {name.name}; {if_repeated}")
    if not any(codes):
        late = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
        return Outcome(
            stop_exit_code(first.name) if first else EXIT_TRY_AGAIN,
            f"killed rank {late}, which did not stop in time; {if_repeated}",
        )
    failed = [rank for rank, code in enumerate(codes) if code]
    rank = min(failed, key=lambda rank: rank in written and written[rank].is_consequence)  # the first with a cause
    reason = f"failed: {written[rank].message}" if rank in written else _last_words(group.log_file(rank), codes[rank])
    return Outcome(codes[rank] or 0, f"rank {rank} {reason} (log: {group.log_file(rank)})")


def _last_words(log: Path, code: int | None) -> str:
    """That a rank without an outcome ended with `code`, and the message that it left in its log, if any."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    said = next((line.removeprefix(_SAID) for line in reversed(lines) if line.startswith(_SAID)), "")
    return f"exited with {code}{': ' if said else ''}{said}"
