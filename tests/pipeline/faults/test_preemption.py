"""What a process does with stop signals while its main thread cannot see them."""

import signal
import subprocess
import sys
import time

import pytest

from data.errors import EXIT_TRY_AGAIN
from pipeline.errors import CONTINUES_IF_SAVED
from pipeline.faults.preemption import REASONS, TIME_LIMIT, StopRequests, StopSignals, agreed_reason
from pipeline.faults.time_limit import TimeLimit
from tests.support.command import environment

PROCESS = """
import ctypes, os, signal, subprocess, sys
from pipeline.faults import preemption
from pipeline.faults.preemption import StopRequests, StopSignals

def end(code, message):
    print(message, flush=True)
    os._exit(code)

for number in (1, 2):  # whatever the tests were started with
    signal.signal(number, DISPOSITION)

def wait_in_native_code():
    print("ready", flush=True)
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):  # as in a collective, which a signal does not interrupt
        ctypes.CDLL(None).pthread_mutex_lock(lock)

with StopSignals(end) as signals:
    BODY
"""
LOOP = """
    requests = StopRequests(signals, GRACE)
    with requests:
        wait_in_native_code()
"""


def start(body: str, disposition: str = "signal.SIG_DFL") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS.replace("BODY", body).replace("DISPOSITION", disposition)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )


def message_of(process: subprocess.Popen[str], code: int = EXIT_TRY_AGAIN) -> str:
    """The message of a process that ended with `code`, by default the one for trying again."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    return output.strip()


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("checkpoint", ["", "step-00000007"])
def test_outside_the_loop_a_signal_ends_the_process_at_once(number: signal.Signals, checkpoint: str) -> None:
    process = start(f"signals.last_checkpoint = '{checkpoint}'; wait_in_native_code()")
    wait_until_ready(process)
    process.send_signal(number)
    complete = f"{checkpoint} is complete; " if checkpoint else ""
    code = 130 if number == signal.SIGINT else EXIT_TRY_AGAIN
    assert message_of(process, code) == f"stopped by {number.name}; {complete}the same command continues"


def test_signals_that_were_ignored_at_the_start_stay_ignored() -> None:
    """As by `nohup`, and by a shell script that starts a program in the background."""
    process = start("wait_in_native_code()", "signal.SIG_IGN")
    wait_until_ready(process)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert message_of(process).startswith("stopped by SIGTERM; ")


@pytest.mark.parametrize("saved", [True, False])
def test_in_the_loop_the_deadline_ends_a_hanging_process_and_names_the_complete_checkpoint(saved: bool) -> None:
    body = LOOP.replace("GRACE", "1")
    if saved:
        body = body.replace("with", "requests.saved('step-00000007')\n    with")
    process = start(body)
    wait_until_ready(process)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR2)
    what = "step-00000007 is complete, and the same command continues from it"
    if not saved:
        what = f"no checkpoint is known to be complete; {CONTINUES_IF_SAVED}"
    assert (
        message_of(process)
        == f"stopped by SIGUSR2; its save was not complete after checkpoint.grace_seconds (1); {what}"
    )
    assert time.monotonic() - began >= 1


def test_the_same_request_repeated_is_not_a_second_one_but_a_later_signal_is() -> None:
    body = """
    import threading
    preemption._SAME_REQUEST_SECONDS = 1e9
    requests = StopRequests(signals, 600)
    receive = requests._received
    requests._received = lambda number: (receive(number), print(number.name, flush=True))
    def make_late():
        sys.stdin.readline()
        preemption._SAME_REQUEST_SECONDS = -1.0
        print("late", flush=True)
    threading.Thread(target=make_late, daemon=True).start()
    with requests:
        wait_in_native_code()
"""
    process = start(body)
    wait_until_ready(process)
    assert process.stdin
    assert process.stdout
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "late\n"
    process.send_signal(signal.SIGTERM)
    assert message_of(process).startswith(
        "stopped by SIGTERM; a second signal, SIGTERM, ended it at once; no checkpoint is known to be complete"
    )


def test_the_first_signal_is_shown_and_a_second_noted_before_it_ends_the_process_which_does_not_wait_for_the_note() -> (
    None
):
    body = """
    import threading
    preemption._SAME_REQUEST_SECONDS, preemption._NOTE_SECONDS = -1.0, 0.1
    def note(reason):
        print("notes", reason, flush=True)
        threading.Event().wait()
    with StopRequests(signals, 600, on_request=lambda reason: print("shows", reason, flush=True), on_second=note):
        wait_in_native_code()
"""
    process = start(body)
    wait_until_ready(process)
    assert process.stdout
    for word in ("shows", "notes"):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"{word} SIGINT\n"
    message = message_of(process, 130)
    assert message.startswith("stopped by SIGINT; a second signal, SIGINT, ended it at once; no checkpoint is known")


def test_a_request_too_late_for_the_loop_ends_the_process_after_it() -> None:
    body = """
    with StopRequests(signals, 600) as requests:
        os.kill(os.getpid(), 15)
        while not requests.reason:
            pass
    print("went on")
    """
    assert message_of(start(body)) == "stopped by SIGTERM; the same command continues"


def test_time_for_another_save_is_what_the_limit_and_the_grace_period_leave() -> None:
    def end(code: int, message: str) -> None:
        raise AssertionError(message)

    signals = StopSignals(end)  # type: ignore[arg-type]
    limited = StopRequests(signals, 600, TimeLimit(time.time() + 1000))
    limited.margin.save_took(900)
    assert limited.time_for_a_save
    limited.margin.save_took(995)
    assert not limited.time_for_a_save
    signalled = StopRequests(signals, 1e6)  # its deadline must not come while other tests run
    signalled.margin.save_took(1e6 - 5)
    assert signalled.time_for_a_save
    signalled._received(signal.SIGTERM)
    assert not signalled.time_for_a_save


def test_a_child_process_inherits_neither_handlers_nor_files() -> None:
    child = "import os, signal; print(os.listdir('/proc/self/fd'), [signal.getsignal(n) == 0 for n in (10, 12, 15)])"
    run = f'print(subprocess.check_output([sys.executable, "-c", "{child}"], text=True), flush=True); os._exit({EXIT_TRY_AGAIN})'
    without = subprocess.check_output([sys.executable, "-c", child], text=True)
    assert message_of(start(run)) == without.strip()
    assert without.count("True") == 3


def test_the_reason_is_agreed_from_the_flags_of_all_ranks() -> None:
    def end(code: int, message: str) -> None:
        raise AssertionError(message)

    signals = StopSignals(end)  # type: ignore[arg-type]
    quiet = StopRequests(signals, 600, TimeLimit(time.time() + 10_000))
    assert quiet.reason is None
    assert agreed_reason(quiet.flags) is None
    near = StopRequests(signals, 600, TimeLimit(time.time() + 25))
    assert near.reason == TIME_LIMIT
    far = StopRequests(signals, 600, TimeLimit(time.time() + 1000))
    assert far.reason is None
    far.margin.save_took(1000)
    assert far.reason == TIME_LIMIT
    signalled = StopRequests(signals, 1e6)  # its deadline must not come while other tests run
    signalled._received(signal.SIGUSR1)
    assert signalled.reason == "SIGUSR1"
    summed = [sum(flags) for flags in zip(quiet.flags, near.flags, signalled.flags, signalled.flags, strict=True)]
    assert summed == [0, 0, 0, 2, 0, 1]
    assert agreed_reason(summed) == "SIGUSR1"
    count = len(REASONS)
    assert [agreed_reason([float(n == i) for n in range(count)]) for i in range(count)] == list(REASONS)
