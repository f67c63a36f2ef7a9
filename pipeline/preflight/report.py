"""The file through which the leader of a node check hands its findings to the command that waits for them."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pipeline.preflight.finding import Finding


def append_to_report(report: Path, findings: Iterable[Finding]) -> None:
    """Add findings, one JSON object per line."""
    _append(report, [json.dumps(asdict(finding)) for finding in findings])


def finish_report(report: Path) -> None:
    """Mark the report as complete, with an empty object."""
    _append(report, ["{}"])


def read_report(report: Path) -> tuple[list[Finding], bool]:
    """The findings written so far, and whether the report is complete."""
    found: list[Finding] = []
    with suppress(FileNotFoundError):
        for line in report.read_text().splitlines():
            with suppress(ValueError):  # a line that is still being written
                content = json.loads(line)
                if not content:
                    return found, True
                found.append(Finding(**content))
    return found, False


def _append(report: Path, lines: Iterable[str]) -> None:
    with open(report, "a") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
