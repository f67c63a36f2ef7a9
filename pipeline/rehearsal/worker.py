"""The process that builds engines: `python -m pipeline.rehearsal.worker REQUEST RESULT`, two JSON files.

It imports DeepSpeed and torch's compiler once, which takes longer than an engine of a small model, and forks for each
rank: an engine needs a process group, and a process has one.
"""

import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data.errors import EXIT_FAILED
from data.files.atomic_file import write_atomically
from data.files.child_process import end_with_parent
from data.files.json_records import parse_json, to_json
from pipeline.rehearsal.engine_on_fake_tensors import BuiltRank, FakeEngineCase, build_on_fake_tensors, fake_tensors
from pipeline.zero.engine import import_deepspeed

FAILED = "error: "
"""How a line begins that says why there is no result."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What one process builds."""

    cases: tuple[FakeEngineCase, ...]
    processes: int
    """Ranks that are built at a time."""
    parent: int
    """The process that waits for it."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The ranks of each case, in the order of the request."""

    cases: tuple[tuple[BuiltRank, ...], ...]


def main() -> NoReturn:
    """Build what the request says; ends with 0 and a result, or prints why there is none."""
    _, request_file, result_file = sys.argv
    request = parse_json(EngineRequest, Path(request_file).read_bytes())
    end_with_parent(request.parent, EXIT_FAILED)
    try:
        _import_what_engines_need()
        with tempfile.TemporaryDirectory(prefix="coatnet-rehearsal-") as folder:
            result = _build(request, Path(folder))
        write_atomically(Path(result_file), json.dumps(to_json(result)))
        code = 0
    except Exception as error:
        traceback.print_exc()
        _print_error("", error)
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_what_engines_need() -> None:
    """What the forks would each import by themselves. No thread may be started: a fork would lack it."""
    with fake_tensors():
        pass
    import_deepspeed()


def _build(request: EngineRequest, folder: Path) -> EngineResult:
    waiting = [(number, rank) for number, case in enumerate(request.cases) for rank in case.ranks]
    running: dict[int, int] = {}
    worker = os.getpid()
    for number, rank in waiting:
        if len(running) >= request.processes:
            _wait_for_one(running)
        child = os.fork()
        if child == 0:
            _child(request.cases[number], rank, _file(folder, number, rank), worker)
        running[child] = rank
    while running:
        _wait_for_one(running)
    return EngineResult(tuple(_results(folder, number, case) for number, case in enumerate(request.cases)))


def _results(folder: Path, number: int, case: FakeEngineCase) -> tuple[BuiltRank, ...]:
    return tuple(parse_json(BuiltRank, _file(folder, number, rank).read_bytes()) for rank in case.ranks)


def _wait_for_one(running: dict[int, int]) -> None:
    child, status = os.wait()
    rank = running.pop(child)
    if status:
        raise RuntimeError(f"rank {rank}: its process ended with {os.waitstatus_to_exitcode(status)}")


def _child(case: FakeEngineCase, rank: int, file: Path, worker: int) -> NoReturn:
    code = EXIT_FAILED
    try:
        end_with_parent(worker, EXIT_FAILED)
        built = build_on_fake_tensors(case, rank)
        file.write_text(json.dumps(to_json(built)))
        code = 0
    except Exception as error:
        traceback.print_exc()
        _print_error(f"rank {rank}: ", error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _print_error(where: str, error: Exception) -> None:
    """Print the line that is shown to people; the first one counts."""
    reason = str(error).strip().partition("\n")[0]
    print(f"{FAILED}{where}{type(error).__name__}: {reason}", file=sys.stderr)


def _file(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number}-{rank}.json"


if __name__ == "__main__":
    main()
