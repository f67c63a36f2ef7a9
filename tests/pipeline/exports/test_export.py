"""Export and the choice between raw and averaged weights, from checkpoints of one rank without an engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from data.files.digest import json_sha256
from jobs.cli import app
from models.pretrained import load_pretrained
from pipeline.checkpoints.manifest import signed
from pipeline.errors import ConfigError
from pipeline.exports.export import export
from pipeline.runs.run_folder import RunFolder
from pipeline.trained_model import open_trained_model
from tests.support.records import stage_result
from tests.support.trained import CLASSES, assert_same_model, save_trained, trained_model


def save(run: Path, step: int, averaged: bool) -> Path:
    """A checkpoint with the weights of `trained_model(step)`, and those of `trained_model(step + 1)` as average."""
    return save_trained(run, step, averaged=averaged)


@pytest.mark.parametrize(
    ("averaged", "which", "taken"),
    [(True, "auto", "ema"), (True, "raw", "raw"), (True, "ema", "ema"), (False, "auto", "raw"), (False, "raw", "raw")],
)
def test_export_and_loading_take_the_requested_weights(averaged: bool, which: Any, taken: str, tmp_path: Path) -> None:
    path, file = save(tmp_path, 5, averaged), tmp_path / "out.safetensors"
    facts = export(str(path), file, which).facts
    assert (facts.weights, facts.step, facts.source.resolved) == (taken, 5, str(path))
    assert facts.classes_digest == json_sha256(CLASSES)
    wanted = trained_model(6 if taken == "ema" else 5)
    assert_same_model(load_pretrained(file), wanted)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())

    with open_trained_model(str(path), which) as trained:
        assert_same_model(trained.build(), wanted)


def test_an_average_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 5, averaged=False)
    for use in (
        lambda: export(str(path), tmp_path / "out.safetensors", "ema"),
        lambda: open_trained_model(str(path), "ema"),
    ):
        with pytest.raises(ConfigError, match="holds no moving average; use the raw weights, or auto"):
            use()


def test_a_run_folder_means_the_checkpoint_of_its_result_or_else_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "pretrain"
    save(run, 5, averaged=False)
    save(run, 6, averaged=False)
    file = tmp_path / "out.safetensors"
    assert export(str(run), file).facts.step == 6
    RunFolder(run).finish(stage_result("pretrain/checkpoints/step-00000005"))
    assert export(str(run), file).facts.step == 5
    assert_same_model(load_pretrained(file), trained_model(5))
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.safetensors"]


def test_a_checkpoint_of_a_result_that_is_gone_is_not_replaced_by_another(tmp_path: Path) -> None:
    run, file = tmp_path / "pretrain", tmp_path / "out.safetensors"
    save(run, 5, averaged=False)
    shutil.rmtree(save(run, 7, averaged=False))
    damaged = save(run, 6, averaged=False) / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    RunFolder(run).finish(stage_result("pretrain/checkpoints/step-00000007"))
    refused = CliRunner().invoke(app, ["export", str(run), str(file)])
    assert refused.exit_code == 78
    checkpoints = run / "checkpoints"
    assert (
        f"stage pretrain: done, but its checkpoint {checkpoints}/step-00000007 no longer exists, the newest intact one is "
        f"{checkpoints}/step-00000005; restore it, or remove {run}/result.json to continue from that one"
    ) in " ".join(refused.stderr.split())
    assert not file.exists()
    exported = CliRunner().invoke(app, ["export", str(checkpoints / "step-00000005"), str(file)])
    assert f"3 classes (class list {json_sha256(CLASSES)[:8]}), 32 pixels" in exported.stdout


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    path, file = save(tmp_path, 5, averaged=False), tmp_path / "out.safetensors"
    anonymous = save(tmp_path / "other", 5, averaged=False)
    manifest = json.loads((anonymous / "manifest.json").read_text())
    del manifest["model"]
    (anonymous / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(
        ConfigError, match="step-00000005: damaged: not a checkpoint .manifest.json: model is missing.; restore it"
    ):
        export(str(anonymous), file)
    with pytest.raises(
        ConfigError, match="cannot be written .*No such file or directory.*; give another file, or make that folder"
    ):
        export(str(path), tmp_path / "missing" / "out.safetensors")
    with open(path / "rank-00000.safetensors", "r+b") as damaged:
        damaged.seek(-10, 2)
        damaged.write(b"\xff")
    result = CliRunner().invoke(app, ["export", str(path), str(file)])
    assert result.exit_code == 78
    assert "rank-00000.safetensors does not have the checksum of the manifest; restore it from a copy" in result.stderr
    assert not file.exists()
