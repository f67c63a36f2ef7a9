"""How a process ends: an exit code and one message, for a person or for the process that started this one."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from data.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_TRY_AGAIN, CoatnetError, may_pass
from data.files.atomic_file import DISK_FULL, atomic_path
from data.text.printable import printable_message
from pipeline.errors import CAUSE_FILE, FAULTY_NODES_FILE, MachineFaulty, stop_exit_code
from pipeline.errors import STARTS_OVER as STARTS_OVER
from pipeline.monitoring.bounded_output import finish_outputs
from pipeline.monitoring.console import PrintableConsole, styled_text

if TYPE_CHECKING:
    from pipeline.faults.preemption import StopSignals

OUTCOME_FILE = "COATNET_OUTCOME_FILE"
"""Environment variable with the file to which a rank writes its outcome; without it, a rank prints to stderr."""

_CLEAN_UP_SECONDS = 3.0  # after Ctrl-C
_PRINT_SECONDS = 5.0  # for printing the message, to a terminal that may hang
_REPORT_SECONDS = 15.0  # for that and all the rest, such as a log that may hang
_ending = threading.Lock()


@dataclass(frozen=True, slots=True)
class Outcome:
    """An exit code and a message for a person."""

    code: int
    message: str
    is_consequence: bool = False
    """Whether another rank has the cause."""


class StageFailed(CoatnetError):
    """A stage that ended with `outcome`, whose message names the fix."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome
        self.exit_code, self.is_consequence = outcome.code, outcome.is_consequence


@contextmanager
def exit_on_error(if_repeated: str = STARTS_OVER, signals: "StopSignals | None" = None) -> Iterator[None]:
    """Turn an exception inside into one message and an exit code; tracebacks go to the log.

    Args:
        if_repeated: what the same command does when it is given again, for the message.
        signals: of this process, if it acts on them; they know better what the same command does.
    """
    try:
        with _prompt_interrupts(f"stopped; {if_repeated}"):
            yield
    except CoatnetError as error:
        if isinstance(error, MachineFaulty):
            _report_faulty_nodes(error.nodes)
        again = error.if_repeated or (signals.if_repeated() if signals else if_repeated)
        message = f"{error}; {again}" if error.retryable else str(error)
        _end(Outcome(error.exit_code, message, error.is_consequence))
    except KeyboardInterrupt:
        _end(Outcome(EXIT_INTERRUPTED, f"stopped; {if_repeated}"))
    except Exception as error:
        if signals is not None and signals.first is not None and "RANK" in os.environ:
            # The signal may have reached a compiler that this rank had started, or the node's storage.
            logging.getLogger(__name__).exception("while this rank was ending")
            first_line = str(error).strip().partition("\n")[0]
            why = f"it could not save, since it met {type(error).__name__}: {first_line}"
            _end(Outcome(stop_exit_code(signals.first), f"stopped by {signals.first}; {why}; {signals.if_repeated()}"))
        if isinstance(error, OSError) and may_pass(error):
            again = signals.if_repeated() if signals else if_repeated
            logging.getLogger(__name__).warning("a file system failed", exc_info=error)
            where = f"{error.filename}: " if error.filename is not None else ""
            _end(Outcome(EXIT_TRY_AGAIN, f"{where}{error.strerror}: a file system or its server fails; {again}"))
        if OUTCOME_FILE not in os.environ and CAUSE_FILE not in os.environ:
            if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FULL):
                where = f"{error.filename}: " if error.filename is not None else ""
                _end(Outcome(EXIT_CONFIG, f"{where}{error.strerror}"))
            raise
        logging.getLogger(__name__).exception("unexpected")
        first_line = str(error).strip().partition("\n")[0]
        _end(Outcome(1, f"{type(error).__name__}: {first_line}"))


@contextmanager
def _prompt_interrupts(message: str) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt as usual, but cleaning up, which may wait for reads, has limited time.

    A second Ctrl-C ends the process at once. What is written has another name until it is complete.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # it is ignored, or `StopSignals` acts on it
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda _number, _frame: end_process(EXIT_INTERRUPTED, message))
        deadline = threading.Timer(_CLEAN_UP_SECONDS, end_process, [EXIT_INTERRUPTED, message])
        deadline.daemon = True
        deadline.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_process(code: int, message: str, is_consequence: bool = False) -> NoReturn:
    """End this process at once with `code` and report `message`, from any thread and whatever the others are doing.

    A rank must not wait for other ranks and threads on its way out. The first call counts; later ones never return.
    """
    with _ending:
        guard = threading.Timer(_REPORT_SECONDS, os._exit, [code])
        guard.daemon = True
        guard.start()
        outcome_file, cause_file = os.environ.get(OUTCOME_FILE), os.environ.get(CAUSE_FILE)
        if outcome_file is not None:
            _report_outcome(outcome_file, Outcome(code, message, is_consequence))
        elif cause_file is None:
            _print_error(message)
        elif not is_consequence:
            _report_cause(cause_file, code, message)
        log = logging.getLogger(__name__)
        if log.hasHandlers():  # the log file of a rank
            log.error("exit %d: %s", code, message)
        sys.stdout.flush()
        finish_outputs()
        logging.shutdown()
        os._exit(code)


def _report_outcome(outcome_file: str, outcome: Outcome) -> None:
    """Write `outcome` for the launcher; where that fails, print it to the log that the launcher names."""
    try:
        Path(outcome_file).write_text(json.dumps(asdict(outcome)))
    except OSError as error:  # the disk of TMPDIR is full, or a cleaner has removed the folder
        _print_error(f"{outcome.message} ({outcome_file}: {error.strerror})")


def _report_cause(cause_file: str, code: int, message: str) -> None:
    """Write the outcome to `cause_file`, unless another rank already has."""
    try:
        file = os.open(cause_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(file, "w", errors="backslashreplace") as opened:  # for the job's log, see slurm/launch.sh
            opened.write(f"{code}\n{printable_message(message)}\n")
    except FileExistsError:
        pass
    except OSError:
        _print_error(message)


def _report_faulty_nodes(nodes: Sequence[str]) -> None:
    """Name them for the scheduler, if it waits for this process; before the cause, after which others end this one."""
    file = os.environ.get(FAULTY_NODES_FILE)
    if file is None or not nodes:
        return
    try:
        with atomic_path(Path(file), shared=True) as unfinished:  # all ranks write the same
            unfinished.write_text("".join(f"{node}\n" for node in nodes), errors="backslashreplace")
    except OSError as error:
        _print_error(f"{file}: {error.strerror}; the job cannot go on without {', '.join(nodes)}")


def _end(outcome: Outcome) -> None:
    if OUTCOME_FILE in os.environ or "RANK" in os.environ:
        end_process(outcome.code, outcome.message, outcome.is_consequence)
    if not _print_error(outcome.message):
        finish_outputs()
        os._exit(outcome.code)  # Python would wait for the output at its end
    sys.exit(outcome.code)


def _print_error(message: str) -> bool:
    """Returns whether it is printed: a terminal that is gone, or whose reader has stopped, changes no exit code."""
    printed: list[bool] = []

    def show() -> None:
        with suppress(OSError):
            console = PrintableConsole(stderr=True)
            console.show_cursor()  # which a progress bar hides, perhaps that of a process that was killed
            console.print(styled_text(("error: ", "bold red"), message), soft_wrap=True)
            printed.append(True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    thread.join(_PRINT_SECONDS)
    return bool(printed)
