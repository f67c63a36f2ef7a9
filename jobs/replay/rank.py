"""One rank of a replay or of a verification: where its output goes, and what the leader prints."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from data.files.json_records import load_json, to_json
from data.files.regular_file import read_regular
from jobs.console import PIPE_WIDTH, print_line
from jobs.exit_codes import end_process
from jobs.replay.verification_view import show_verification
from jobs.replay.view import show_replay
from jobs.scheduler.job_end import node_name
from pipeline.monitoring.output import redirect_output
from pipeline.replay.replay import ReplayRequest, replay_here
from pipeline.replay.verification import REPORT as VERIFICATION
from pipeline.replay.verification import VerificationRequest, verify_here
from pipeline.runs.run_folder import RunFolder


def verify_and_print(request: VerificationRequest, *, as_json: bool) -> None:
    """Verify as one rank, and print the report on the leader: as JSON, or in a table."""
    console, say = _output(request.out, as_json=as_json)
    report = verify_here(request, say, node_name(os.environ), end_process)
    if report is None:
        return
    if as_json:
        _print_json(console, {"folder": str(request.out), "holds": report.holds, **to_json(report)})
    else:
        show_verification(report, request.out, console)


def verification_holds(out: Path) -> bool:
    """Whether the verification whose results are in `out` has found nothing wrong."""
    content = load_json(read_regular(out / VERIFICATION))
    return isinstance(content, dict) and content.get("holds") is True


def replay_and_print(request: ReplayRequest, *, as_json: bool) -> None:
    """Recompute as one rank, and print the report on the leader: as JSON, or in tables."""
    console, say = _output(request.out, as_json=as_json)
    report = replay_here(request, say, node_name(os.environ), end_process)
    if report is None:
        return
    if as_json:
        _print_json(console, {"folder": str(request.out), **to_json(report)})
    else:
        show_replay(report, request.out, console)


def _output(out: Path, *, as_json: bool) -> tuple[Console, Callable[[str], None]]:
    """The console of this rank, whose log is in `out`, and a function that shows the user a line on the leader."""
    rank, logs = int(os.environ["RANK"]), RunFolder(out)
    logs.logs.mkdir(parents=True, exist_ok=True)
    console = redirect_output(logs, rank)
    if not console.is_terminal:
        console.width = PIPE_WIDTH

    def say(line: str) -> None:
        if rank == 0 and not as_json:
            print_line(console, line)

    return console, say


def _print_json(console: Console, document: dict[str, Any]) -> None:
    print_line(console, json.dumps(document, indent=1).replace("\x7f", "\\u007f"))
