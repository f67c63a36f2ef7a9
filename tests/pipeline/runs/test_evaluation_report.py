"""Reading reports of evaluations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.files.json_records import parse_json
from pipeline.errors import ConfigError
from pipeline.runs.evaluation_report import FILES, EvaluationReport, read_report, report_folders, report_text
from pipeline.runs.evaluation_summary import summary_rows
from tests.support.paths import ROOT
from tests.support.records import evaluation_report


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = evaluation_report()
    (tmp_path / "evaluation.json").write_text(report_text(report))
    assert read_report(tmp_path) == report


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "evaluate.md").read_text()
    content = json.loads(report_text(evaluation_report()))
    inner = [
        key
        for part in ("model", "data", "computation", "circumstances", "figures", "calibration")
        for key in content[part]
    ]
    assert [key for key in [*content, *inner] if f"`{key}`" not in page] == []
    assert [name for name in FILES if f"`{name}`" not in page] == []


def test_signatures_of_addresses_are_not_kept() -> None:
    report = evaluation_report()
    shards = "https://user:secret@host/shards?X-Amz-Signature=secret"
    mistake = replace(report.mistakes[0], shard="s-0.tar?X-Amz-Signature=secret")
    text = report_text(replace(report, data=replace(report.data, shards=shards), mistakes=(mistake,)))
    assert "secret" not in text
    assert parse_json(EvaluationReport, text).mistakes[0].shard == "s-0.tar?..."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format coatnet-evaluation version 2, and this program reads coatnet-evaluation version 1"),
        ({"format": "other"}, "format other version 1, and this program reads"),
        (
            {"figures": None},
            r"damaged \(figures: must be an object, not None\); restore it from a copy, or evaluate again",
        ),
        ({"calibration": {"error": 2, "bins": []}}, r"damaged \(calibration: error: must be from 0 to 1, not 2.0\)"),
    ],
)
def test_another_version_and_damage_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = json.loads(report_text(evaluation_report())) | change
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_report(tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no evaluation.json there; it is written by: coatnet evaluate"):
        read_report(tmp_path)


def test_reports_are_found_in_the_folder_of_evaluations_and_beside_it(tmp_path: Path) -> None:
    for name in ("evaluations/b", "evaluations/a", "mine", "evaluations/a/deeper"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "evaluation.json").touch()
    (tmp_path / "evaluations/unfinished").mkdir()
    assert [str(found.relative_to(tmp_path)) for found in report_folders(tmp_path)] == [
        "evaluations/a", "evaluations/b", "mine",
    ]  # fmt: skip


def test_the_summary_says_what_does_not_count() -> None:
    rows = dict(summary_rows(evaluation_report()))
    assert rows["images"] == "12 (1 more cannot be used; 3 left out by label map or index)"
    assert rows["classes"] == "3, 1 of them without samples"
    assert rows["precision@1"] == "75.00%"
    assert rows["mean average precision"] == "50.00% over 2 classes"
