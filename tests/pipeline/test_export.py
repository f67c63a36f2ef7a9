"""Export and the choice between raw and averaged weights, from checkpoints of one rank without an engine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs.checkpoint_discovery import find_checkpoint
from jobs.cli import app
from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.checkpoints.checkpoint import AVERAGED, open_checkpoint
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import signed
from pipeline.errors import ConfigError
from pipeline.export import export
from pipeline.runs.run_folder import RunFolder
from pipeline.weights import fitted_weights, load_weights, persistent_buffers
from pipeline.zero.fragments import Fragment
from tests.pipeline.checkpoints.small import freeze, saver
from tests.support.exported import load_exported
from tests.support.records import RUN, checkpoint_facts, stage_result

MODEL: dict[str, Any] = {"name": "coatnet_debug", "num_classes": 3, "image_size": 32, "depths": [1, 1, 2, 1]}


def model(seed: int) -> CoAtNet:
    """Weights and statistics that depend on the seed."""
    made = create_model(**MODEL, seed=seed)
    for buffer in persistent_buffers(made).values():
        buffer += torch.rand(buffer.shape, generator=torch.Generator().manual_seed(seed))
    return made.eval()


def save(run: Path, step: int, averaged: bool) -> Path:
    """A checkpoint with the weights of `model(step)`, and those of `model(step + 1)` as their average."""
    raw, average = model(step), model(step + 1)
    own, other = dict(raw.named_parameters()), dict(average.named_parameters())
    fragments = []
    for name, parameter in own.items():
        tensors = {kind: parameter.detach().view(-1) for kind in ("master", "exp_avg", "exp_avg_sq")}
        if averaged:
            tensors["ema"] = other[name].detach().view(-1)
        fragments.append(Fragment(name, 0, parameter.numel(), tensors, True))
    buffers = persistent_buffers(raw)
    facts = checkpoint_facts(step, replace(RUN, model=MODEL), ema_updates=step if averaged else None)
    if averaged:
        buffers |= {AVERAGED + name: buffer for name, buffer in persistent_buffers(average).items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    with saver(run, keep_last=9) as one:
        one.save(LiveState(facts, fragments, buffers, shapes))
        assert one.finish()
    freeze(run)
    return run / "checkpoints" / f"step-{step:08d}"


def assert_equal(one: CoAtNet, other: CoAtNet) -> None:
    wanted = other.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in one.state_dict().items())
    pictures = torch.randn(2, 32, 32, 3)
    assert torch.equal(one.eval()(pictures), other(pictures))


@pytest.mark.parametrize(
    ("averaged", "which", "taken"),
    [(True, "auto", "ema"), (True, "raw", "raw"), (True, "ema", "ema"), (False, "auto", "raw"), (False, "raw", "raw")],
)
def test_export_and_loading_take_the_requested_weights(averaged: bool, which: Any, taken: str, tmp_path: Path) -> None:
    path, file = save(tmp_path, 5, averaged), tmp_path / "out.safetensors"
    metadata = export(str(path), file, which)
    assert (metadata["weights"], metadata["step"], metadata["source"]) == (taken, "5", str(path))
    assert metadata["classes"] == RUN.digests.classes_digest
    wanted = model(6 if taken == "ema" else 5)
    assert_equal(load_exported(file), wanted)
    with safe_open(file, framework="pt") as tensors:
        assert tensors.metadata() == metadata
    assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())

    loaded = create_model(**MODEL)
    load_weights(loaded, open_checkpoint(path), which)
    assert_equal(loaded, wanted)
    begun = create_model(**MODEL)
    weights = fitted_weights(begun, open_checkpoint(path), which)
    assert all(torch.equal(weights[name], parameter) for name, parameter in wanted.named_parameters())
    assert all(torch.equal(persistent_buffers(begun)[n], b) for n, b in persistent_buffers(wanted).items())


def test_an_average_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 5, averaged=False)
    for use in (
        lambda: export(str(path), tmp_path / "out.safetensors", "ema"),
        lambda: load_weights(create_model(**MODEL), open_checkpoint(path), "ema"),
    ):
        with pytest.raises(ConfigError, match="holds no moving average; use the raw weights, or auto"):
            use()


def test_a_run_folder_means_the_checkpoint_of_its_result_or_else_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "pretrain"
    save(run, 5, averaged=False)
    save(run, 6, averaged=False)
    file = tmp_path / "out.safetensors"
    assert export(find_checkpoint(str(run)), file)["step"] == "6"
    RunFolder(run).finish(stage_result("pretrain/checkpoints/step-00000005"))
    assert export(find_checkpoint(str(run)), file)["step"] == "5"
    assert_equal(load_exported(file), model(5))
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
    assert f"3 classes (class list {RUN.digests.classes_digest[:8]}), 32 pixels" in exported.stdout


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
    with pytest.raises(ConfigError, match="nowhere: not a recipe file or run folder"):
        find_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: not a run folder, and contains none"):
        find_checkpoint(str(tmp_path / "empty"))
    with pytest.raises(
        ConfigError, match="cannot be written .*No such file or directory.*; give another file, or free some space"
    ):
        export(str(path), tmp_path / "missing" / "out.safetensors")
    with open(path / "rank-00000.safetensors", "r+b") as damaged:
        damaged.seek(-10, 2)
        damaged.write(b"\xff")
    result = CliRunner().invoke(app, ["export", str(path), str(file)])
    assert result.exit_code == 78
    assert "rank-00000.safetensors does not have the checksum of the manifest; restore it from a copy" in result.stderr
    assert not file.exists()
