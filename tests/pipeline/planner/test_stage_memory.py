"""Memory of a stage on a GPU, and the largest micro-batch that fits."""

from dataclasses import replace

import pytest

from models.variants import find_variant
from pipeline.planner.hardware import Cluster, find_cluster
from pipeline.planner.memory import step_memory
from pipeline.planner.stage_memory import gpu_memory, largest_micro_batch, with_micro_batch
from pipeline.planner.trace.training_trace import Workload
from pipeline.recipe.schema import Precision
from tests.pipeline.planner.stages import CLASSES, small_stage


def cluster(gpus: int = 2, memory: float = 80e9) -> Cluster:
    return replace(find_cluster("h100", gpus, 8), memory=memory)


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize(
    ("variant", "micro_batch", "rounds", "ranks", "precision", "zero_stage", "drop", "gigabytes"),
    [
        ("coatnet_0", 128, 2, 8, "bf16", 1, 0.2, 10.5),
        ("coatnet_3", 128, 1, 32, "bf16_autocast", 1, 0.5, 35.2),
        ("coatnet_5", 64, 1, 64, "bf16", 1, 0.0, 44.3),
        ("coatnet_7", 32, 1, 128, "bf16", 2, 0.0, 34.0),
    ],
)
def test_the_peak_of_a_step_on_fake_tensors_of_a_gpu_is_predicted(
    variant: str,
    micro_batch: int,
    rounds: int,
    ranks: int,
    precision: Precision,
    zero_stage: int,
    drop: float,
    gigabytes: float,
) -> None:
    """Against `benchmarks/rehearsal/`, whose commands and peaks docs/gpus.md prints."""
    subject = Workload(find_variant(variant), 224, 1000, micro_batch, precision, drop_path_rate=drop)
    found = step_memory(subject, zero_stage, ranks, rounds=rounds)
    assert found.total / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_a_gpu_needs_what_a_step_holds_and_a_reserve() -> None:
    stage = small_stage(ema_decay=0.99, zero_stage=2)
    memory = gpu_memory(stage, CLASSES, cluster())
    law = cluster().law
    assert memory.reserve == round(law.context.value + law.fragmentation.value * memory.step.working)
    assert memory.needed == memory.step.total + memory.reserve
    assert sum(memory.kinds.values()) == memory.needed
    assert set(memory.kinds) > {"moving average", "communication buckets"}
    assert memory.size == 80e9


def test_it_fits_if_there_is_just_as_much() -> None:
    needed = gpu_memory(small_stage(), CLASSES, cluster()).needed
    assert gpu_memory(small_stage(), CLASSES, cluster(memory=needed)).fits
    assert not gpu_memory(small_stage(), CLASSES, cluster(memory=needed - 1)).fits


@pytest.mark.parametrize("images", [32, 24, 2])
def test_the_largest_micro_batch_is_that_of_trying_all_of_them(images: int) -> None:
    stage = small_stage(batch={"global_size": images, "micro_size": 1})
    share = images // 2
    needed = {
        size: gpu_memory(with_micro_batch(stage, size), CLASSES, cluster()).needed
        for size in range(1, share + 1)
        if share % size == 0
    }
    assert sorted(needed.values()) == list(needed.values())
    for memory in {least + more for least in needed.values() for more in (-1, 0, 1)}:
        fitting = [size for size, need in needed.items() if need <= memory]
        assert largest_micro_batch(stage, CLASSES, cluster(memory=memory)) == (max(fitting) if fitting else None)


def test_a_bucket_of_bf16_gradients_is_copied_while_it_is_summed_as_float32() -> None:
    sizes = {
        gradients: gpu_memory(
            small_stage(zero_stage=2, communication={"gradients": gradients, "bucket_size": 1000}), CLASSES, cluster()
        ).step
        for gradients in ("fp32", "bf16")
    }
    assert sizes["fp32"].buckets == sizes["bf16"].buckets == 2 * 1000
    assert sizes["fp32"].working >= sizes["bf16"].working
