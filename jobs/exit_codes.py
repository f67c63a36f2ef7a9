"""How a process ends: an exit code and one message, for a person or for the process that started this one."""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from data.errors import EXIT_CONFIG, EXIT_TRY_AGAIN, CoatnetError, may_pass
from pipeline.errors import CAUSE_FILE
from pipeline.errors import CONTINUES as CONTINUES
from pipeline.errors import STARTS_OVER as STARTS_OVER

OUTCOME_FILE = "COATNET_OUTCOME_FILE"
"""Environment variable with the file to which a rank writes its outcome; without it, a rank prints to stderr."""

EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT

_REPORT_SECONDS = 10.0  # for printing the message, to a log or terminal that may hang
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
def exit_on_error(if_repeated: str = CONTINUES) -> Iterator[None]:
    """Turn an exception inside into one message and an exit code; tracebacks go to the log.

    Args:
        if_repeated: what the same command does when it is given again, for messages of errors that do not know it.
    """
    try:
        yield
    except CoatnetError as error:
        message = f"{error}; {error.if_repeated or if_repeated}" if error.retryable else str(error)
        _end(Outcome(error.exit_code, message, error.is_consequence))
    except KeyboardInterrupt:
        _end(Outcome(EXIT_INTERRUPTED, f"stopped; {if_repeated}"))
    except Exception as error:
        if isinstance(error, OSError) and may_pass(error):
            logging.getLogger(__name__).warning("a file system failed", exc_info=error)
            where = f"{error.filename}: " if error.filename is not None else ""
            _end(Outcome(EXIT_TRY_AGAIN, f"{where}{error.strerror}: a file system or its server fails; {if_repeated}"))
        if OUTCOME_FILE not in os.environ and CAUSE_FILE not in os.environ:
            if isinstance(error, OSError) and error.filename is not None:
                _end(Outcome(EXIT_CONFIG, f"{error.filename}: {error.strerror}"))
            raise
        logging.getLogger(__name__).exception("unexpected")
        first_line = str(error).strip().partition("\n")[0]
        _end(Outcome(1, f"{type(error).__name__}: {first_line}"))


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
            Path(outcome_file).write_text(json.dumps(asdict(Outcome(code, message, is_consequence))))
        elif cause_file is None:
            _print_error(message)
        elif not is_consequence:
            _report_cause(cause_file, code, message)
        log = logging.getLogger(__name__)
        if log.hasHandlers():  # the log file of a rank
            log.error("exit %d: %s", code, message)
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)


def _report_cause(cause_file: str, code: int, message: str) -> None:
    """Write the outcome to `cause_file`, unless another rank already has."""
    try:
        file = os.open(cause_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(file, "w", errors="backslashreplace") as opened:  # names need not be UTF-8
            opened.write(f"{code}\n{message}\n")
    except FileExistsError:
        pass
    except OSError:
        _print_error(message)


def _end(outcome: Outcome) -> None:
    if OUTCOME_FILE in os.environ or "RANK" in os.environ:
        end_process(outcome.code, outcome.message, outcome.is_consequence)
    _print_error(outcome.message)
    sys.exit(outcome.code)


def _print_error(message: str) -> None:
    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
