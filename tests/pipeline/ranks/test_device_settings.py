"""What is set before GPUs compute, and which GPU a rank takes. There is no GPU here: torch.cuda is faked."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import ConfigError
from pipeline.evaluation import model_evaluation
from pipeline.predict import chosen_device
from pipeline.ranks.device_settings import gpu_of_rank, gpu_variables, prepare_devices
from pipeline.ranks.distributed import join_ranks
from pipeline.ranks.rendezvous import STORE_FOLDER
from pipeline.recipe.loader import load_recipe
from tests.support.command import environment
from tests.support.recipes import write_recipe

SETTINGS = """
import sys
from pipeline.ranks.device_settings import prepare_devices
prepare_devices(gpus=True, deterministic={})
import torch
print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
print(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
print("torch._inductor" in sys.modules)
import torch._inductor.config
print(torch._inductor.config.deterministic)
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
print(torch.backends.cuda.matmul.fp32_precision == "tf32", torch.backends.cudnn.conv.fp32_precision == "tf32")
"""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment, and torch's switches, as they were."""
    before = dict(os.environ)
    yield
    prepare_devices(gpus=False, deterministic=False)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms_are_set_without_importing_the_compiler_which_follows(deterministic: bool) -> None:
    said = subprocess.run(
        [sys.executable, "-c", SETTINGS.format(deterministic)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.stderr == ""
    on, off = str(deterministic), str(not deterministic)
    assert said.stdout.splitlines() == [
        f"{on} False", f"{on} {off}", "False", on, "False False", "False False",
    ]  # fmt: skip


def test_the_variables_of_cuda_and_nccl_are_set_where_nobody_has() -> None:
    expected = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_ENABLE_MONITORING": "0",
    }  # fmt: skip
    assert gpu_variables({}, deterministic=True) == expected
    fast = gpu_variables({}, deterministic=False)
    assert fast == {name: value for name, value in expected.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    own = {
        "CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_NCCL_ENABLE_MONITORING": "1",
    }  # fmt: skip
    assert gpu_variables(own, deterministic=True) == {}
    # With this one, cuBLAS refuses every product once deterministic algorithms are demanded.
    assert gpu_variables(own | {"CUBLAS_WORKSPACE_CONFIG": ":8192:4"}, deterministic=True) == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
    }


def test_ranks_without_gpus_see_none() -> None:
    prepare_devices(gpus=False, deterministic=True)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["HIP_VISIBLE_DEVICES"]) == ("", "")


def test_training_gives_the_same_bits_with_and_without_the_switch_on_cpus() -> None:
    """The operations of a step with their gradients, among them those that have another algorithm on GPUs."""

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, rows = torch.randn(64, 8, requires_grad=True), torch.randint(64, (200,))
        y = x.index_select(0, rows).index_add(0, rows[:50], torch.randn(50, 8))
        images = torch.randn(2, 8, 6, 6, requires_grad=True)
        pooled = torch.nn.functional.max_pool2d(images, 2)
        return [y, pooled, *torch.autograd.grad(y.square().sum() + pooled.square().sum(), [x, images])]

    prepare_devices(gpus=False, deterministic=True)
    deterministic = results()
    prepare_devices(gpus=False, deterministic=False)
    assert all(torch.equal(one, other) for one, other in zip(deterministic, results(), strict=True))


@pytest.mark.parametrize(
    ("local_rank", "visible", "variables", "number"),
    [
        (0, 1, {}, 0),
        (3, 8, {}, 3),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "4,6"}, 1),
        (5, 1, {"CUDA_VISIBLE_DEVICES": "0"}, 0),  # srun --gpus-per-task=1
        (5, 1, {"CUDA_VISIBLE_DEVICES": "GPU-3f1c"}, 0),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_of_its_task(
    local_rank: int, visible: int, variables: dict[str, str], number: int
) -> None:
    assert gpu_of_rank(local_rank, visible, variables, "n1") == number


@pytest.mark.parametrize(
    ("visible", "variables"),
    [
        (1, {}),
        (1, {"CUDA_VISIBLE_DEVICES": "0", "COATNET_LAUNCHER": "7"}),  # all ranks of `coatnet run` have the same list
        (2, {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ],
)
def test_more_ranks_than_gpus_are_refused_with_the_settings_to_change(visible: int, variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        gpu_of_rank(2, visible, variables, "n1")
    there = "is 1" if visible == 1 else "are 2"
    assert f"number 2 on n1 needs a GPU of its own, and there {there} for the ranks" in str(refused.value)
    assert "resources.gpus_per_rank=0" in str(refused.value)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A machine with one GPU and a rank of two; returns how process groups are created."""
    created: list[dict[str, Any]] = []
    tmp_path.chmod(0o700)
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", STORE_FOLDER: str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "COATNET_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: created.append({"backend": backend, **options})
    )
    return created


def test_two_ranks_without_gpus_run_beside_the_only_one(one_gpu: list[dict[str, Any]]) -> None:
    ranks = join_ranks(1, gpus=False)
    assert (ranks.device, one_gpu[0]["backend"], one_gpu[0]["device_id"]) == (torch.device("cpu"), "gloo", None)


def test_two_ranks_with_a_gpu_each_are_refused_beside_the_only_one(one_gpu: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="number 1 on .* needs a GPU of its own, and there is 1"):
        join_ranks(1)
    assert one_gpu == []


def test_nccl_is_given_the_gpu_of_the_rank(one_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    gpu = torch.device("cuda", 0)
    assert join_ranks(1).device == gpu
    assert (one_gpu[0]["backend"], one_gpu[0]["device_id"]) == ("nccl", gpu)


@pytest.mark.parametrize(("gpus_per_rank", "device"), [(0, "cpu"), (1, "cuda"), (None, "cuda")])
def test_a_model_is_evaluated_as_its_stage_did_and_on_a_gpu_if_that_is_not_known(
    gpus_per_rank: int | None, device: str, monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path
) -> None:
    stage = None
    if gpus_per_rank is not None:
        resources = {"ranks": 1, "gpus_per_rank": gpus_per_rank}
        stage = load_recipe(write_recipe(tmp_path, shards, resources=resources)).stages["pretrain"]
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(model_evaluation, "known_stage", lambda model: stage)
    monkeypatch.setattr(
        model_evaluation, "evaluate_model", lambda request, stage, ranks, progress: devices.append(ranks.device)
    )
    monkeypatch.delenv("RANK", raising=False)
    request: Any = SimpleNamespace(model="model", threads=1)
    nothing: Any = None
    model_evaluation.evaluate_here(request, nothing)
    assert devices == [torch.device(device)]


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_predictions_take_the_gpu_that_is_there_unless_they_are_to_use_cpus(
    name: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device(name) == torch.device(device)
