"""Model FLOP/s utilization. There is no GPU here, so its name is faked."""

from pathlib import Path

import pytest
import torch

from pipeline.monitoring.utilization import Utilization, operations_per_image, peak_operations
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.ranks.gpus import Gpu
from pipeline.recipe.loader import load_recipe
from tests.support.recipes import write_recipe

GPU = torch.device("cuda", 0)


@pytest.fixture
def plan(shards: Path, tmp_path: Path) -> TrainPlan:
    changes = ["model.name=coatnet_0", "resolution=224"]
    planned = plan_stage(load_recipe(write_recipe(tmp_path, shards), changes), "pretrain")
    assert isinstance(planned, TrainPlan)
    return planned


def test_training_on_an_image_takes_three_forwards(plan: TrainPlan) -> None:
    # 4.2 billion multiply-adds per forward in the paper's Table 3, except for the norms, which are not counted.
    assert operations_per_image(plan) == pytest.approx(6 * 4.2e9, rel=0.04)


def test_recomputing_blocks_does_not_raise_utilization(plan: TrainPlan) -> None:
    before = operations_per_image(plan)
    object.__setattr__(plan, "stage", plan.stage.model_copy(update={"activation_checkpointing": "every_block"}))
    assert operations_per_image(plan) == before


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("NVIDIA GeForce RTX 5090", 209e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090 Ti", 71e12),
        ("NVIDIA GeForce RTX 3060", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA L40", None),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_gpu(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_operations(GPU) == peak
    assert Gpu(name, 0).peak == peak


def test_utilization_is_a_share_of_the_peak_of_all_gpus(plan: TrainPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    at = Utilization(plan, Ranks(0, 4, GPU)).at
    assert at(4 * 312e12 / operations_per_image(plan)) == pytest.approx(1.0)


def test_there_is_no_utilization_without_a_known_peak(plan: TrainPlan) -> None:
    assert Utilization(plan, Ranks(0, 4, torch.device("cpu"))).at(1e6) is None
