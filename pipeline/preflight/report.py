"""The file through which the leader of a node check hands its findings to the command that waits for them."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from data.files.json_records import load_json, to_record
from pipeline.preflight.finding import Finding
from pipeline.runs.json_lines import append_json_line


def append_to_report(report: Path, findings: Iterable[Finding]) -> None:
    """Add findings, one JSON object per line."""
    for finding in findings:
        append_json_line(report, asdict(finding), sync=True)


def finish_report(report: Path) -> None:
    """Mark the report as complete, with an empty object."""
    append_json_line(report, {}, sync=True)


def read_report(report: Path) -> tuple[list[Finding], bool]:
    """The findings written so far, and whether the report is complete."""
    found: list[Finding] = []
    with suppress(FileNotFoundError):
        for line in report.read_bytes().splitlines():
            with suppress(ValueError):  # a line that is still being written
                content = load_json(line)
                if content == {}:
                    return found, True
                found.append(to_record(Finding, content))
    return found, False
