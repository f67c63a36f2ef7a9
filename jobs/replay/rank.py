"""One rank of a replay: where its output goes, and what the leader prints."""

import json
import os

from data.files.json_records import to_json
from jobs.console import PIPE_WIDTH, print_line
from jobs.exit_codes import end_process
from jobs.replay.view import show_replay
from jobs.scheduler.job_end import node_name
from pipeline.monitoring.output import redirect_output
from pipeline.replay.replay import ReplayRequest, replay_here
from pipeline.runs.run_folder import RunFolder


def replay_and_print(request: ReplayRequest, *, as_json: bool) -> None:
    """Recompute as one rank, and print the report on the leader: as JSON, or in tables."""
    rank, logs = int(os.environ["RANK"]), RunFolder(request.out)
    logs.logs.mkdir(parents=True, exist_ok=True)
    console = redirect_output(logs, rank)
    if not console.is_terminal:
        console.width = PIPE_WIDTH

    def say(line: str) -> None:
        if rank == 0 and not as_json:
            print_line(console, line)

    report = replay_here(request, say, node_name(os.environ), end_process)
    if report is None:
        return
    if as_json:
        document = {"folder": str(request.out), **to_json(report)}
        print_line(console, json.dumps(document, indent=1).replace("\x7f", "\\u007f"))
    else:
        show_replay(report, request.out, console)
