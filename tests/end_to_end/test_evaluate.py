"""`coatnet evaluate` against the evaluations of the stages that trained the models, and as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


def report_of(*arguments: str | Path) -> dict[str, Any]:
    """What `coatnet evaluate --json` prints."""
    done = coatnet("evaluate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize(("precision", "decay"), [("fp32", None), ("bf16_autocast", 0.8), ("bf16", 0.8)])
def test_the_figures_are_those_of_the_stages_own_evaluation_to_the_bit_on_one_and_two_ranks(
    precision: str, decay: float | None, shards: Path, tmp_path: Path
) -> None:
    ema = {"ema_decay": decay} if decay else {}
    recipe = write_recipe(tmp_path, shards, precision=precision)
    steps = ["pretrain.steps=3", "pretrain.optimizer.warmup_steps=1", *(f"pretrain.{k}={v}" for k, v in ema.items())]
    trained = coatnet("train", recipe, "pretrain", *steps)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs/test/pretrain"
    result = json.loads((run / "result.json").read_text())
    one = report_of(run, shards / "validation")
    two = report_of(run, shards / "validation", "--ranks=2", "--out", tmp_path / "two")
    for report in (one, two):
        assert report["figures"] == result["validation"]
        assert {
            name: {key: row[key] for key in ("samples", "top1", "top5")} for name, row in report["classes"].items()
        } == result["classes"]
        assert (report["computation"]["precision"], report["computation"]["batch_size"]) == (precision, 3)
        assert report["model"]["weights"] == result["weights"] == ("ema" if decay else "raw")
    assert (one["circumstances"]["ranks"], two["circumstances"]["ranks"]) == (1, 2)
    for own in ("circumstances", "folder"):
        del one[own], two[own]
    assert one == two
