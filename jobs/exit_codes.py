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

from data.errors import EXIT_CONFIG, CoatnetError
from pipeline.errors import CAUSE_FILE

OUTCOME_FILE = "COATNET_OUTCOME_FILE"
"""Environment variable with the file into which a rank writes its outcome; without it, it prints to stderr."""

EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT

_TELLING_SECONDS = 10.0  # for the message of a process whose log or terminal may hang
_ending = threading.Lock()


@dataclass(frozen=True, slots=True)
class Outcome:
    """An exit code and what to tell a person; `consequence` where another rank has the cause."""

    code: int
    message: str
    consequence: bool = False


class StageFailed(CoatnetError):
    """A stage that ended with `outcome`, whose message says what to do."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome
        self.exit_code, self.is_consequence = outcome.code, outcome.consequence


@contextmanager
def exit_on_error(again: str = "the same command continues from the last checkpoint") -> Iterator[None]:
    """Turn what goes wrong inside into one message and an exit code; tracebacks go to the log.

    Args:
        again: what comes of giving the command again after it was stopped.
    """
    try:
        yield
    except CoatnetError as error:
        message = f"{error}; {again}" if error.retryable else str(error)
        _end(Outcome(error.exit_code, message, error.is_consequence))
    except KeyboardInterrupt:
        _end(Outcome(EXIT_INTERRUPTED, f"stopped; {again}"))
    except Exception as error:
        if OUTCOME_FILE not in os.environ and CAUSE_FILE not in os.environ:
            if isinstance(error, OSError) and error.filename is not None:
                _end(Outcome(EXIT_CONFIG, f"{error.filename}: {error.strerror}"))
            raise
        logging.getLogger(__name__).exception("unexpected")
        first_line = str(error).strip().partition("\n")[0]
        _end(Outcome(1, f"{type(error).__name__}: {first_line}"))


def end_process(code: int, message: str, consequence: bool = False) -> NoReturn:
    """End this process at once with `code` and tell `message`, from any thread and whatever the others are at.

    A rank must not wait for peers and threads on its way out. The first call decides; later ones never return.
    """
    with _ending:
        guard = threading.Timer(_TELLING_SECONDS, os._exit, [code])
        guard.daemon = True
        guard.start()
        outcome_file, cause_file = os.environ.get(OUTCOME_FILE), os.environ.get(CAUSE_FILE)
        if outcome_file is not None:
            Path(outcome_file).write_text(json.dumps(asdict(Outcome(code, message, consequence))))
        elif cause_file is None:
            _show(message)
        elif not consequence:
            _tell_cause(cause_file, code, message)
        log = logging.getLogger(__name__)
        if log.hasHandlers():  # the log file of a rank
            log.error("exit %d: %s", code, message)
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)


def _tell_cause(cause_file: str, code: int, message: str) -> None:
    """Write the outcome into `cause_file`, unless another rank has."""
    try:
        file = os.open(cause_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(file, "w") as opened:
            opened.write(f"{code}\n{message}\n")
    except FileExistsError:
        pass
    except OSError:
        _show(message)


def _end(outcome: Outcome) -> None:
    if OUTCOME_FILE in os.environ or "RANK" in os.environ:
        end_process(outcome.code, outcome.message, outcome.consequence)
    _show(outcome.message)
    sys.exit(outcome.code)


def _show(message: str) -> None:
    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
