"""`coatnet bench data`: what the readers of a node deliver, compared with the recipe's demand."""

import json
from pathlib import Path

import pytest
import torch

from models.complexity import count_training_cost
from models.variants import VARIANTS
from pipeline.planner.step_estimate import computing_speed
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


def test_the_readers_are_measured_as_training_runs_them(shards: Path, tmp_path: Path) -> None:
    jitter = "pretrain.data.color_jitter={brightness: 0.4, hue: 0.1}"
    done = coatnet("bench", "data", write_recipe(tmp_path, shards), jitter, "--seconds", "0.3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["stage"], facts["ranks"], facts["workers"]) == ("pretrain", 2, 1)
    assert facts["delivered"]["images_per_second"] > 0
    parts = facts["milliseconds_per_image"]
    assert parts["decoding"] > 0
    assert parts["random_augment"] < parts["decoding"]  # the recipe has none
    assert parts["random_erasing"] < parts["color_jitter"]
    assert facts["demand"] == 2 * facts["demand_per_rank"]
    if not torch.cuda.is_available():  # then it is the cores that train, at the speed that was measured
        assert facts["assumed"] == {"device": "the cores of this machine", "utilization": None}
        assert facts["demand"] < 10**5


def test_a_gpu_that_is_named_trains_as_fast_as_the_planner_estimates_or_at_a_share_of_its_peak(
    shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    named = ("bench", "data", recipe, "--seconds", "0.3", "--json", "--device", "H100")
    facts = json.loads(coatnet(*named).stdout)
    assert facts["assumed"] == {"device": "H100", "utilization": None}
    stage = load_recipe(recipe).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    assert facts["demand_per_rank"] == computing_speed(stage, 3, "H100").value
    facts = json.loads(coatnet(*named, "--utilization", "0.4").stdout)
    # The multiply-adds of a forward and twice that backward, on an H100 at 40 % of 989 TFLOP/s.
    assert facts["assumed"] == {"device": "H100", "utilization": 0.4}
    cost = count_training_cost(VARIANTS["coatnet_debug"], 32).multiply_adds
    assert facts["demand_per_rank"] == pytest.approx(0.4 * 989e12 / (2 * cost))


@pytest.mark.parametrize(("demand", "result"), [("0.1", "enough: "), ("1e9", "too little: 0% of what is needed")])
def test_the_output_says_whether_the_node_is_fast_enough(
    shards: Path, tmp_path: Path, demand: str, result: str
) -> None:
    done = coatnet(
        "bench", "data", write_recipe(tmp_path, shards), "finetune", "data.workers=2", "--seconds", "0.3",
        "--images-per-second", demand, "--ranks", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result in done.stdout
    assert "finetune: 1 ranks with 2 reader threads each" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "stage evaluate evaluates; name a stage that trains"),
        (["--ranks", "3"], "--ranks 3: stage pretrain has 2"),
        (["--device", "TPU"], "--device TPU: not one of GB200"),
    ],
)
def test_a_stage_or_option_that_cannot_be_measured_is_refused(
    shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = coatnet("bench", "data", write_recipe(tmp_path, shards), *arguments)
    assert done.returncode == 78
    assert message in done.stderr
