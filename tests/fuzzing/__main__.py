"""The long form of test_fuzzing.py: `python -m tests.fuzzing --seconds 600 [--target NAME] [--seed N] [--keep FOLDER]`.

Each target runs in a process of its own with a limit on its memory. Ends with 1 if anything failed.
"""

import argparse
import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzzing.campaign import ROOT, SECONDS, campaign, limit_memory
from tests.fuzzing.targets import TARGETS

_GRACE = 60.0
"""Seconds for the imports and seeds of a target, and for its last input."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (default 60)")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="one target; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="targets at a time")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.target or list(TARGETS)
    if arguments.alone:
        return _alone(names[0], arguments)
    share = arguments.seconds * min(arguments.workers, len(names)) / len(names)
    with ThreadPoolExecutor(arguments.workers) as pool:
        found = list(pool.map(lambda name: _in_process(name, share, arguments), names))
    _report(found, arguments.seed)
    return 1 if any(one["failures"] for one in found) else 0


def _alone(name: str, arguments: argparse.Namespace) -> int:
    """In the process of one target: its figures, as JSON on the last line."""
    logging.disable()
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as folder:
        limit_memory()
        # A library that does not return to Python cannot be interrupted by a signal.
        faulthandler.dump_traceback_later(arguments.seconds + _GRACE / 2 + 2 * SECONDS, exit=True)
        figures = campaign(
            TARGETS[name], Path(folder), seed=arguments.seed, seconds=arguments.seconds, keep=arguments.keep
        )
        faulthandler.cancel_dump_traceback_later()
    print("\n" + json.dumps(figures.content()))
    return 0


def _in_process(name: str, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzzing", "--alone", "--target", name, "--seconds", str(seconds)]
    command += ["--seed", str(arguments.seed)] + (["--keep", str(arguments.keep)] if arguments.keep else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        print(done.stderr[-3000:], file=sys.stderr)
        found = {"target": name, "inputs": 0, "values": 0, "refusals": 0, "slowest": 0.0, "megabytes": 0, "numbers": {}}
        found["failures"] = {f"the process ended with {done.returncode}": 1}
    return found


def _report(found: list[dict[str, Any]], seed: int) -> None:
    print(f"{'target':22}{'inputs':>9}{'values':>9}{'refused':>9}{'failed':>8}{'slowest s':>11}{'more MiB':>10}")
    for one in found:
        failed = sum(one["failures"].values())
        print(
            f"{one['target']:22}{one['inputs']:9,}{one['values']:9,}{one['refusals']:9,}{failed:8,}"
            f"{one['slowest']:11.3f}{one['megabytes']:10,}"
        )
    totals = [sum(one[key] for one in found) for key in ("inputs", "values", "refusals")]
    failures = sum(sum(one["failures"].values()) for one in found)
    print(f"{'all':22}" + "".join(f"{total:9,}" for total in totals) + f"{failures:8,}")
    for one in found:
        for failure, count in sorted(one["failures"].items()):
            print(f"{one['target']}: {count:,} x {failure} (seed {seed}, inputs {one['numbers'].get(failure, [])})")


if __name__ == "__main__":
    sys.exit(main())
