"""`coatnet report`: what a run has is in the page, what it has not is named, and nothing in it is obeyed."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from data.text.printable import printable
from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from tests.jobs.report.runs import HOSTILE, SETTINGS, made_run, report, write_curves, write_evaluation
from tests.jobs.runs import MadeRun


class Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(run: MadeRun) -> Page:
    return Page((run.path / "report.html").read_text())


def test_a_report_has_what_the_run_has(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    write_evaluation(run.stage("pretrain"), ["ant", "bee", "cat"])
    done = report(run.path)
    assert done.exit_code == 0, done.output
    page = page_of(run)
    for expected in (
        "small", "coatnet_debug", "64 pixels", "0.003, cosine, warm-up of 4 steps", "crop random, flip, CutMix 1.0",
        "2 then 4", "node1", "75.00%", "resume, step 200", "roll-back, step 305", "to the weights of step 200",
        "ranks: 2 before, bee now", "1 time a sample could not be used", "1 resume", "1 step not finite", "2 saves",
        "Classes, worst first", "Calibration", "Most confused classes", "Most confident mistakes", "the ant (ant)",
        "Not started yet.", "Learning rate", "global_size: 12",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.count("polyline") == 9  # a curve each, and two in three of the six charts
    assert page.count("img") == 3
    (marks,) = {sum(attributes.get("class") == "mark resume" for _, attributes in page.elements)}
    assert marks == 6
    assert (tmp_path / "runs/small/report.html").stat().st_size < 400_000
    assert f"{run.path}/report.html: 2 stages, " in done.output


def test_a_report_loads_nothing_and_obeys_no_name(tmp_path: Path) -> None:
    run = made_run(tmp_path, HOSTILE)
    write_evaluation(run.stage("pretrain"), HOSTILE)
    assert report(run.path).exit_code == 0
    page = page_of(run)
    plain = made_run(tmp_path / "plain", ["a", "b", "c", "d", "e", "f"])
    write_evaluation(plain.stage("pretrain"), ["a", "b", "c", "d", "e", "f"])
    assert report(plain.path).exit_code == 0
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in page_of(plain).elements]
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "link", "object", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/png;").startswith("data:image/png;")
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for name in HOSTILE:
        assert printable(name) in page.text


def test_evaluations_with_an_event_file_of_their_own_are_in_the_curves(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    stage = run.stage("pretrain")
    for path in stage.tensorboard.glob("events*"):
        path.rename(stage.path / path.name)
    file = EventFile(stage.path / "validation", 1, pytest.fail)
    file.add(charts.scalars({"validation/top1": 0.625}), 350)
    file.close()
    assert report(run.path).exit_code == 0
    page = page_of(run)
    assert page.count("polyline") == 9
    assert "top-1: 62.5% at step 350" in page.text


def test_addresses_are_shown_without_their_secrets(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    address = "https://me:secret@host.example/train?sv=1&X-Amz-Signature=50ff7a99"
    changed = SETTINGS | {"data": {"train": address, "validation": "/v"}}
    run.stage("pretrain").recipe.write_text(yaml.safe_dump(changed))
    run.note("pretrain", "save_failed", step=1, reason=f"no answer from {address}")
    assert report(run.path).exit_code == 0
    content = (run.path / "report.html").read_text()
    assert "host.example/train" in content
    assert "50ff7a99" not in content
    assert "secret" not in content


def test_a_running_stage_is_reported_with_what_there_is(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.freeze()
    write_curves(run.stage("pretrain"), range(1, 30))
    run.note("pretrain", "begin", ranks=2, node="node1")
    run.progress("pretrain", 29, 40)
    with run.stage("pretrain").lock():
        done = report(run.path)
    assert done.exit_code == 0, done.output
    text = page_of(run).text
    assert "29\nof 40" in text.replace(" of 40", "\nof 40")
    for missing in (
        "pretrain: its settings are those that were submitted: recipe.yaml is missing",
        "pretrain: there is no final evaluation: the stage is not done (running)",
        "pretrain: versions and device are not known: no checkpoint in the run folder can be read",
        "finetune: it has not been started",
    ):
        assert missing in text
        assert f"warning: not in the report: {missing}" in done.output


def test_every_damaged_file_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    stage = run.stage("pretrain")
    evaluation = write_evaluation(stage, ["ant", "bee", "cat"])
    (stage.path / "result.json").write_text('{"stage": 1')
    with open(stage.events.path, "a") as log:
        log.write('{"time": "never"}\n{"half')
    event_file = next(stage.tensorboard.glob("events.out.*"))
    event_file.write_bytes(event_file.read_bytes()[:-100])
    (evaluation / "mistakes.png").write_bytes((evaluation / "mistakes.png").read_bytes()[:200])
    (evaluation / "confusion.png").unlink()
    other = stage.path / "evaluations" / "other"
    other.mkdir()
    (other / "evaluation.json").write_text(json.dumps({"format": "coatnet-evaluation", "version": 1}))
    stage.recipe.write_text("stage: [")
    done = report(run.path)
    assert done.exit_code == 0, done.output
    text = page_of(run).text
    for problem in (
        "result.json: damaged (", "events.jsonl: 2 lines of ", f"{event_file.parent.name}/{event_file.name}: ends within a record",
        "validation/mistakes.png cannot be shown", "validation/confusion.png cannot be shown: No such file",
        "other/evaluation.json: damaged", "recipe.yaml: damaged (",
    ):  # fmt: skip
        assert problem in text, problem
    assert "Loss" in text


@pytest.mark.parametrize("content", [b"mine", b"<html><title>coatnet report</title></html>"])
def test_another_file_is_only_replaced_on_request(tmp_path: Path, content: bytes) -> None:
    run = made_run(tmp_path)
    out = tmp_path / "mine.html"
    out.write_bytes(content)
    done = report(run.path, "--out", out)
    assert done.exit_code == 78
    assert "exists and is not an earlier report; replace it with --overwrite" in done.output.replace("\n", " ")
    assert out.read_bytes() == content
    assert report(run.path, "--out", out, "--overwrite").exit_code == 0
    assert report(run.path, "--out", out).exit_code == 0  # now it is an earlier report


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    done = report(run.path, "--out", tmp_path / "nowhere" / "report.html")
    assert done.exit_code == 78
    assert "cannot be written (No such file or directory); name another file with --out" in done.output.replace(
        "\n", " "
    )
    os.mkfifo(tmp_path / "pipe")
    assert "name a file with --out" in report(run.path, "--out", tmp_path / "pipe").output.replace("\n", " ")


def test_a_stage_alone_can_be_reported_and_no_run_is_an_error(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    assert report(run.path / "pretrain").exit_code == 0
    assert "Not started yet." not in page_of(run).text
    assert report(tmp_path / "nothing").exit_code == 78
