"""The ranks of a stage as processes of this machine: started together, ended together."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.outcome import EXIT_INTERRUPTED, OUTCOME_FILE, Outcome, StageFailed
from pipeline.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_TRY_AGAIN
from pipeline.recipe import Stage
from pipeline.run_folder import RunFolder

_LAUNCHER = "COATNET_LAUNCHER"
_GRACE_SECONDS = 10
_POLL_SECONDS = 0.05


def launch_ranks(command: list[str], stage: Stage, folder: RunFolder) -> None:
    """Run `coatnet COMMAND` as the ranks of `stage` and wait for them.

    Rank 0 speaks on this process's standard output; what else they print goes to their logs. When one fails, the
    others are ended. If this process dies, whatever the reason, they die with it.

    Raises:
        StageFailed: with the outcome of the rank that failed first.
    """
    count, port = stage.resources.ranks, _free_port()
    with tempfile.TemporaryDirectory(prefix="coatnet-") as outcomes:
        processes = []
        for rank in range(count):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(stage.resources.threads_per_rank),
                OUTCOME_FILE: f"{outcomes}/{rank}.json",
                _LAUNCHER: str(os.getpid()),
            }
            with open(folder.log_file(rank), "ab") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "jobs", *command],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=None if rank == 0 else output,
                        stderr=output,
                    )
                )
        try:
            codes = _wait(processes)
        except KeyboardInterrupt:
            # The terminal has sent the signal to the ranks, too.
            _end_all(processes, None)
            raise
        except BaseException:
            _end_all(processes, signal.SIGTERM)
            raise
        if any(codes):
            _end_all(processes, signal.SIGTERM)
            raise StageFailed(_outcome(codes, Path(outcomes), folder))


def die_with_launcher() -> None:
    """In a rank: have the kernel kill this process when the launcher is gone, so that no rank trains on unseen."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(EXIT_INTERRUPTED)


def is_rank() -> bool:
    """True in a process that was started as one rank of a group."""
    return "RANK" in os.environ


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes when all are done, or when one has failed; None for those that still run."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        time.sleep(_POLL_SECONDS)


def _end_all(processes: list[subprocess.Popen[bytes]], first_signal: signal.Signals | None) -> None:
    if first_signal is not None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(first_signal)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(codes: list[int | None], outcomes: Path, folder: RunFolder) -> Outcome:
    """The most telling outcome: when one rank fails for a reason, others fail because it is gone."""
    written = {}
    for rank in range(len(codes)):
        try:
            written[rank] = Outcome(**json.loads((outcomes / f"{rank}.json").read_text()))
        except (OSError, ValueError):
            continue
    for code in (EXIT_CONFIG, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_INTERRUPTED):
        for outcome in written.values():
            if outcome.code == code:
                return outcome
    for rank, ended in enumerate(codes):
        if ended is not None and ended < 0:
            name = signal.Signals(-ended).name
            message = (
                f"rank {rank} was killed by {name}, by someone or by the system for want of memory; "
                "the same command continues from the last checkpoint"
            )
            return Outcome(128 - ended, message)
    rank, ended = next((rank, code) for rank, code in enumerate(codes) if code)
    reason = f"failed: {written[rank].message}" if rank in written else f"exited with {ended}"
    return Outcome(ended, f"rank {rank} {reason} (log: {folder.log_file(rank)})")
