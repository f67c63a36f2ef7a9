"""Memory by kind. That of real engines is in test_engine_state.py; without a GPU to fill, errors are created."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.complexity import count_costs, count_parameters, count_training_cost
from models.variants import VARIANTS
from pipeline.errors import RunFailed
from pipeline.host import this_host
from pipeline.memory_estimate import (
    estimate_memory,
    is_host_memory_full,
    out_of_host_memory,
    out_of_memory,
)
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.sections import CommunicationSettings
from pipeline.state_bytes import bucket_bytes, bytes_of_state
from tests.support.recipes import write_recipe

LARGE = 10**9


@pytest.fixture(scope="module")
def planned(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainPlan]:
    recipe = write_recipe(tmp_path_factory.mktemp("memory"), shards)

    def plan(*changes: str) -> TrainPlan:
        base = ["model.name=coatnet_0", "resolution=224", "precision=bf16", "zero_stage=1", "batch.global_size=256",
                "batch.micro_size=4", "data.lanes=4", "communication.bucket_size=1000000"]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:  # the shards have fewer samples than such a batch
            patch.setattr("pipeline.plan.check_length", lambda *arguments: None)
            made = plan_stage(load_recipe(recipe, [*base, *changes]), "pretrain", 1)
        assert isinstance(made, TrainPlan)
        return made

    return plan


@pytest.mark.parametrize(
    ("precision", "zero_stage", "fixed", "shared"),
    [
        ("fp32", 0, 16, 0), ("fp32", 1, 8, 12), ("fp32", 2, 4, 16), ("fp32", 3, 0, 20),
        ("bf16_autocast", 1, 8, 12), ("bf16_autocast", 2, 4, 16), ("bf16_autocast", 3, 0, 20),
        ("bf16", 1, 6, 12), ("bf16", 2, 2, 16), ("bf16", 3, 0, 18),
    ],
)  # fmt: skip
@pytest.mark.parametrize("world_size", [1, 2, 8, 512])
def test_state_follows_the_measured_formulas(
    precision: Any, zero_stage: int, fixed: int, shared: int, world_size: int
) -> None:
    held = sum(bytes_of_state(LARGE, precision, zero_stage, world_size)) / LARGE
    assert held == pytest.approx(fixed + shared / world_size, rel=1e-6)


def test_shares_are_rounded_up() -> None:
    assert bytes_of_state(9, "bf16", 3, 4) == (6, 12, 36)


def test_activations_without_recomputation_are_the_counted_ones() -> None:
    counted = sum(cost.activation_bytes for cost in count_costs(VARIANTS["coatnet_0"], 224))
    assert count_training_cost(VARIANTS["coatnet_0"], 224, 1000, "none").activation_bytes == counted


def test_recomputed_blocks_store_their_inputs_and_one_at_a_time_its_activations() -> None:
    stem, *blocks, head = count_costs(VARIANTS["coatnet_debug"], 32, 3)
    # The debug model halves 32 pixels in stem, s1, s2 and s3: widths 8, 8, 16, 32, 32.
    inputs = [2 * 3 * 32**2, 2 * 8 * 16**2, 2 * 8 * 8**2, 2 * 16 * 4**2, 2 * 32 * 2**2]
    costs = [part.activation_bytes for part in (stem, *blocks)]
    debug = VARIANTS["coatnet_debug"]
    assert (
        count_training_cost(debug, 32, 3, "every_block").activation_bytes
        == sum(inputs) + max(costs) + head.activation_bytes
    )
    convolutions = sum(inputs[:3]) + max(costs[:3])
    assert (
        count_training_cost(debug, 32, 3, "mbconv").activation_bytes
        == convolutions + sum(costs[3:]) + head.activation_bytes
    )


def test_each_kind_scales_with_the_settings_it_depends_on(planned: Callable[..., TrainPlan]) -> None:
    plan = planned()
    parameters = count_parameters(VARIANTS["coatnet_0"], 224, 3)
    memory = estimate_memory(plan.stage, 3, 8)
    assert memory.weights == pytest.approx(2 * parameters, rel=5e-3)  # statistics of BatchNorm in addition
    assert (memory.gradients, memory.moving_average) == (4 * parameters, 0)
    assert memory.staging == memory.optimizer_state == pytest.approx(12 * parameters / 8, rel=1e-6)
    average = estimate_memory(planned("ema_decay=0.9999").stage, 3, 8)
    assert average.moving_average == pytest.approx(4 * parameters / 8, rel=1e-6)
    assert average.staging == pytest.approx(16 * parameters / 8, rel=1e-6)
    half = estimate_memory(planned("batch.micro_size=2").stage, 3, 8).activations
    assert memory.activations / 2 < half < 0.6 * memory.activations  # gradients of weights in addition
    assert 1.85 < estimate_memory(planned("precision=fp32").stage, 3, 8).activations / memory.activations < 2.1
    assert memory.device == sum((memory.weights, memory.gradients, memory.optimizer_state, memory.activations))


def failure(plan: TrainPlan, world_size: int, *, begun: bool = True) -> str:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total\nmore lines")
    failed = out_of_memory(error, plan, world_size, begun=begun)
    assert isinstance(failed, RunFailed)
    return str(failed)


def test_the_message_has_the_failed_allocation_the_estimate_and_the_settings_to_change(
    planned: Callable[..., TrainPlan],
) -> None:
    plan = planned()
    message = failure(plan, 8)
    memory = estimate_memory(plan.stage, 3, 8)
    assert message.startswith(
        "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total). By estimate"
    )
    assert f"each rank needs {memory.device / 1e9:.1f} GB: activations {memory.activations / 1e9:.1f} GB, " in message
    assert (
        "with micro-batches of 4 on 8 ranks. Change settings, most effective first: activation_checkpointing=mbconv, "
        in message
    )
    assert "zero_stage=2, " in message
    assert "batch.micro_size=" not in message


def advice(message: str) -> list[str]:
    return [
        part.partition(",")[0] for part in message.partition("Change settings, most effective first: ")[2].split("; ")
    ]


def test_settings_are_listed_in_the_order_of_the_memory_they_save(planned: Callable[..., TrainPlan]) -> None:
    assert advice(failure(planned(), 8)) == [
        "activation_checkpointing=mbconv", "activation_checkpointing=every_block", "zero_stage=2", "zero_stage=3",
        "resources.ranks=16",
    ]  # fmt: skip
    # Nothing is left to recompute, and with a small micro-batch the state is what counts.
    bare = planned("activation_checkpointing=every_block", "batch.micro_size=1")
    assert advice(failure(bare, 1))[0] == "resources.ranks=2"
    assert not any("activation_checkpointing" in change for change in advice(failure(bare, 1)))


def test_a_smaller_micro_batch_is_only_advised_before_the_first_save(planned: Callable[..., TrainPlan]) -> None:
    assert advice(failure(planned(), 8, begun=False))[-1].startswith("batch.micro_size=2 (another run")


def test_impossible_settings_are_not_advised(planned: Callable[..., TrainPlan]) -> None:
    for setting in ("compile", "fused_depthwise"):
        without_zero_3 = planned(f"{setting}=true", "zero_stage=2")
        assert not any("zero_stage" in change for change in advice(failure(without_zero_3, 8)))
    # 64 micro-batches cannot be shared by 128 ranks.
    assert not any("resources.ranks" in change for change in advice(failure(planned(), 64)))


def test_a_larger_gpu_is_advised_if_no_setting_helps(planned: Callable[..., TrainPlan]) -> None:
    plan = planned("activation_checkpointing=every_block", "zero_stage=3", "precision=fp32")
    alone = replace(
        plan, stage=plan.stage.model_copy(update={"batch": plan.stage.batch.model_copy(update={"global_size": 4})})
    )
    assert failure(alone, 1).endswith("Use GPUs with more memory")


def test_on_a_gpu_the_message_has_the_memory_that_torch_uses(
    planned: Callable[..., TrainPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, torch's counters are replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 70_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 79_000_000_000)
    assert "Torch holds 70.0 GB and has reserved 79.0 GB" in failure(planned(), 8)


def test_host_memory_that_runs_out_is_recognized_and_gets_the_advice(planned: Callable[..., TrainPlan]) -> None:
    with pytest.raises(RuntimeError) as failure:  # a real allocation, of more than any machine has
        torch.empty(2**60, dtype=torch.uint8)
    assert is_host_memory_full(failure.value)
    assert is_host_memory_full(MemoryError())
    assert not is_host_memory_full(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_host_memory_full(RuntimeError("shapes cannot be multiplied"))
    plan = planned("resources.ranks=4", "precision=fp32")
    error = out_of_host_memory(failure.value, plan, begun=False)
    assert isinstance(error, RunFailed)
    message = str(error)
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1152921504606846976 bytes" in message
    need = 4 * estimate_memory(plan.stage, 3, 4, on_cpu=True).host
    assert f"By estimate 4 ranks of this machine ({this_host().text}) need {need / 1e9:.1f} GB; each: " in message
    assert "activations " in message
    assert "buckets" not in message, "their pages are never touched"
    for change in ("activation_checkpointing=every_block, ", "resources.ranks=2, ", "batch.micro_size=2 (another run"):
        assert change in message
    assert "batch.micro_size=" not in str(out_of_host_memory(MemoryError(), plan, begun=True)).partition("Change ")[2]


@pytest.mark.parametrize(
    ("zero_stage", "changes", "per_element"),
    [
        (1, {}, 0), (2, {}, 2 + 4), (2, {"gradients": "bf16"}, 2), (2, {"overlap": True}, 4 + 4), (3, {}, 4),
        (3, {"overlap": True}, 4),
    ],
)  # fmt: skip
def test_buckets_follow_the_settings_of_communication(
    zero_stage: int, changes: dict[str, Any], per_element: int
) -> None:
    settings = CommunicationSettings(bucket_size=1000, **changes)
    assert bucket_bytes(LARGE, "bf16", zero_stage, 1, settings) == 1000 * per_element
