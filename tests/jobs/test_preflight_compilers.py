"""Findings about what compiled stages need where they run."""

from pathlib import Path

import pytest

from jobs.preflight import assess_recipe
from pipeline.recipe.loader import load_recipe
from tests.jobs.findings import found, wrong
from tests.support.recipes import write_recipe


def test_a_compiler_is_required_only_if_the_stage_runs_here(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    (finding,) = wrong(found(tmp_path, shards, "compile=true"))
    assert finding.what == "compile: torch.compile needs a C++ compiler and there is none on PATH"
    recipe = load_recipe(tmp_path / "recipe.yaml", ["compile=true"])
    elsewhere = assess_recipe(recipe, ["pretrain"], slurm=True)
    assert not [finding for finding in elsewhere if finding.what.startswith("compile")]


def test_triton_is_required_only_if_the_stage_runs_here_and_gpus_everywhere(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.fused_kernels.find_spec", lambda name: None)
    fused = ["pretrain.fused_depthwise=true", "resources.gpus_per_rank=1"]

    def of_setting(overrides: list[str], *, slurm: bool) -> list[str]:
        recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
        findings = list(assess_recipe(recipe, ["pretrain"], slurm=slurm))
        return [finding.what for finding in wrong(findings) if finding.what.startswith("fused_depthwise")]

    write_recipe(tmp_path, shards)
    what = "fused_depthwise: its kernels are compiled by Triton, which is not installed here"
    assert of_setting(fused, slurm=False) == [what]
    assert of_setting(fused, slurm=True) == []
    (found_everywhere,) = of_setting([fused[0], "resources.gpus_per_rank=0"], slurm=True)
    assert "the ranks of this stage have none" in found_everywhere
