"""Trying inputs on one target, with what became of them: values, refusals, and what must not happen."""

import random
import resource
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from data.errors import CoatnetError

SECONDS = 10.0
"""That one input may take. Most take less than a millisecond."""
MEMORY = 2**31
"""Bytes of address space that one target may take beyond what it has at its start."""
ROOT = Path(__file__).parents[2]
_KEPT = 5
"""Inputs kept of each kind of failure."""


class SilentAcceptance(AssertionError):
    """A damaged input gave a value that cannot be right."""


class Hang(BaseException):
    """An input has taken longer than `SECONDS`. Not an Exception, so that no reader takes it for an error of its own."""


class Fuzz(NamedTuple):
    """How inputs of one format are made and read.

    `read` raises one of `refusals` for what is wrong with an input, and SilentAcceptance for a value that it finds wrong.
    """

    mutate: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (CoatnetError,)


class Target(NamedTuple):
    """One reader. `prepare` makes its seeds in an empty folder."""

    name: str
    prepare: Callable[[Path], Fuzz]


@dataclass
class Figures:
    """What became of the inputs of one target."""

    target: str
    inputs: int = 0
    values: int = 0
    refusals: int = 0
    slowest: float = 0.0
    """Seconds."""
    megabytes: int = 0
    """By which the peak of resident memory grew."""
    failures: Counter[str] = field(default_factory=Counter)
    """By kind and place, such as `OverflowError at data/index.py:140`."""
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """Of the first inputs with each failure."""

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(replace(self, failures=Counter())) | {"failures": dict(self.failures)}


def input_of(fuzz: Fuzz, target: str, seed: int, number: int) -> bytes:
    """Input `number` of a target: a function of the seed."""
    return fuzz.mutate(random.Random(f"{target}/{seed}/{number}"))


def campaign(
    target: Target,
    folder: Path,
    *,
    seed: int = 0,
    inputs: int | None = None,
    seconds: float | None = None,
    keep: Path | None = None,
) -> Figures:
    """Try so many inputs, or as many as fit into so many seconds; with `keep`, write those that fail into that folder."""
    figures = Figures(target.name)
    fuzz = target.prepare(folder)
    began, before = time.monotonic(), _peak()
    while (inputs is None or figures.inputs < inputs) and (seconds is None or time.monotonic() - began < seconds):
        number = figures.inputs
        content = input_of(fuzz, target.name, seed, number)
        failure = _tried(fuzz, content, figures)
        if failure is not None:
            figures.failures[failure] += 1
            numbers = figures.numbers.setdefault(failure, [])
            if len(numbers) < _KEPT:
                numbers.append(number)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{target.name}-{seed}-{number}").write_bytes(content)
    figures.megabytes = (_peak() - before) // 1024
    return figures


def _tried(fuzz: Fuzz, content: bytes, figures: Figures) -> str | None:
    """Read one input; the failure, or None."""
    figures.inputs += 1
    began = time.monotonic()
    try:
        with _time_limit():
            fuzz.read(content)
        figures.values += 1
    except (Exception, Hang) as error:
        if isinstance(error, fuzz.refusals) and not _memory_was_short(error):
            figures.refusals += 1
            return None
        return _place(error)
    finally:
        figures.slowest = max(figures.slowest, time.monotonic() - began)
    return None


def _memory_was_short(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The kind of an error, and the innermost line of the project that it was raised through."""
    if isinstance(error, SilentAcceptance):
        return f"accepted: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
    inside = [frame for frame in own if "/tests/fuzzing/" not in frame.filename] or own or list(frames)
    where = f"{Path(inside[-1].filename).relative_to(ROOT)}:{inside[-1].lineno}" if own else inside[-1].filename
    return f"{type(error).__name__} at {where}"


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise Hang in the block after `SECONDS`. Needs the main thread; in another one nothing is limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def limit_memory() -> None:
    """Let this process take at most `MEMORY` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
