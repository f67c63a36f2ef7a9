"""`coatnet evaluate` on the command line, and its reports in `coatnet status`."""

import json
import shutil
from pathlib import Path

import pytest

from data.index import read_index
from jobs.commands.evaluate import default_folder
from pipeline.runs.run_folder import RunFolder
from tests.conftest import CLASSES, with_broken_member
from tests.servers.s3 import S3Server
from tests.support.command import coatnet
from tests.support.records import stage_result
from tests.support.trained import save_trained

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder of a finished stage."""
    folder = tmp_path / "runs" / "flowers" / "pretrain"
    save_trained(folder, 5, classes=CLASSES)
    (folder / "logs").mkdir()
    RunFolder(folder).finish(stage_result("pretrain/checkpoints/step-00000005"))
    return folder


def test_the_report_is_printed_lies_in_the_run_folder_and_is_in_the_status(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    done = coatnet("evaluate", run, shards / "validation", "--threads=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "evaluations/validation/evaluation.json").read_text())
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    top1 = f"{report['figures']['top1']:.2%}"
    assert f"top-1 {top1}" in lines
    assert "images 15" in lines
    assert f"calibration error {report['calibration']['error']:.4f} (expected, 15 bins of confidence)" in lines
    assert any(line.startswith("bright 5 ") for line in lines)
    pair = report["confused"][0]
    assert f"{pair['true']} {pair['predicted']} {pair['samples']} {pair['share']:.1%}" in lines
    assert lines[-1].startswith(f"{run}/evaluations/validation: evaluation.json, classes.csv, confusion.csv,")

    (run / "damaged").mkdir()
    (run / "damaged" / "evaluation.json").write_text("{}")
    status = coatnet("status", run.parent)
    assert status.returncode == 0, status.stderr
    shown = " ".join(status.stdout.split())
    assert f"pretrain validation 5 raw 32 15 {top1} " in shown
    assert f"pretrain: {run}/damaged/evaluation.json: damaged (format is missing); restore it" in shown
    damaged, intact = json.loads(coatnet("status", run.parent, "--json").stdout)["stages"][0]["evaluations"]
    assert (intact["name"], intact["top1"], intact["step"]) == ("validation", report["figures"]["top1"], 5)
    assert damaged["top1"] is None


def test_unusable_samples_are_named_and_too_many_of_them_end_it(run: Path, shards: Path, tmp_path: Path) -> None:
    broken = with_broken_member(shards, tmp_path / "broken", 2)
    done = coatnet("evaluate", run, broken, "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 more cannot be used" in done.stdout
    assert "damaged: Truncated File Read" in done.stdout
    for entry in read_index(broken).shards[2:]:
        shard = broken / entry.name
        shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff", b"\0\0\0"))  # no image begins with that
    refused = coatnet("evaluate", run, broken, "--out", "other", folder=tmp_path)
    assert refused.returncode == 78
    assert "samples cannot be used (last: " in refused.stderr
    assert "repair the shards, or raise --skipped-share (0.001)" in " ".join(refused.stderr.split())
    assert not (tmp_path / "other" / "evaluation.json").exists()


def test_mistakes_of_a_user_are_refused_before_anything_is_written(run: Path, shards: Path, tmp_path: Path) -> None:
    validation = shards / "validation"
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "confusion.png").touch()
    for arguments, message in (
        ((tmp_path / "nothing", validation), "nothing: no such file or folder; give the run folder of a stage"),
        ((run, tmp_path / "runs"), "runs: no index.json there; build shards with"),
        ((run, validation, "--label-map=no.yaml"), "no.yaml: no such label map"),
        ((run, validation, "--image-size=50"), "--image-size 50: no multiple of 16, as coatnet_debug needs; 48 is"),
        ((run, validation, "--weights=ema"), "holds no moving average; use the raw weights, or auto"),
        ((run, validation, "--out", existing), "has a report already (confusion.png); replace it with --overwrite"),
        ((run, validation, "--out", existing, "--ranks=2"), "has a report already (confusion.png)"),
        ((run, validation, "--out", run / "recipe.yaml"), "the report cannot be written there"),
    ):
        done = coatnet("evaluate", *arguments, folder=tmp_path)
        assert (done.returncode, done.stdout) == (78, ""), done.stderr
        assert message in " ".join(done.stderr.split())
    assert not (run / "evaluations").exists()


def test_ranks_that_another_program_starts_evaluate_together(run: Path, shards: Path, tmp_path: Path) -> None:
    refused = coatnet("evaluate", run, shards / "validation", "--ranks=3", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert refused.returncode == 78
    assert "--ranks 3: this process is one of 1 ranks; leave it out" in refused.stderr


def test_reports_of_different_evaluations_have_different_folders(run: Path, tmp_path: Path) -> None:
    def name(model: Path, shards: str = "s3://bucket/in1k/validation/", **options: object) -> str:
        plain = {"weights": "auto", "image_size": None, "crop": None, "label_map": None}
        folder = default_folder(str(model), shards, **plain | options)  # type: ignore[arg-type]
        assert folder.parent == (run / "evaluations" if model != tmp_path else Path("evaluations"))
        return folder.name

    assert name(run) == name(run.parent) == "validation"
    assert name(run / "checkpoints/step-00000005") == "validation-step-00000005"
    assert name(run, "shards/train/index.json") == "train"
    assert name(run, "https://host/a b.d/?X-Amz-Signature=x") == "a_b.d"
    assert name(run, image_size=384, crop="whole", weights="raw", label_map=Path("x/21k.yaml")) == (
        "validation-21k-384px-whole-raw"
    )
    shutil.rmtree(run.parent)
    assert name(tmp_path, ".") == "shards"


def test_remote_shards_are_evaluated_through_the_cache_with_the_figures_of_local_ones(
    run: Path, shards: Path, s3: S3Server, tmp_path: Path
) -> None:
    url = s3.put(shards / "validation", "evaluated")
    figures = []
    for out, place, cache in (("local", shards / "validation", "unused"), ("remote", url, "cache")):
        done = coatnet(
            "evaluate", run, place, f"--cache={tmp_path}/{cache}", f"--out={out}", "--json", folder=tmp_path
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures.append(json.loads(done.stdout)["figures"])
    assert figures[0] == figures[1]
    assert list((tmp_path / "cache").rglob("*.tar"))
    refused = coatnet(
        "evaluate", run, url, "--out=small", f"--cache={tmp_path}/other", "--cache-gigabytes=0.00001", folder=tmp_path
    )
    assert refused.returncode == 78
    assert "--cache-gigabytes 1e-05: too little for the shards that are needed" in " ".join(refused.stderr.split())
