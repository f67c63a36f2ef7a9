"""Memory of a step: the trace against real runs on a CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch

from models.complexity import count_parameters
from models.registry import create_model
from models.variants import find_variant
from pipeline.planner.memory import StepMemory, step_memory, working_bytes
from pipeline.planner.trace.live_bytes import LiveBytes
from pipeline.planner.trace.training_trace import Workload
from pipeline.recipe.schema import Precision
from pipeline.recipe.sections import CommunicationSettings
from tests.pipeline.planner import memory_worker
from tests.support.ranks import run_ranks

SUBJECT = Workload(find_variant("coatnet_nano"), 32, 10, memory_worker.MICRO_BATCH)
CASES = ("0-fp32-none", "1-bf16-none", "2-bf16_autocast-every_block", "3-bf16-mbconv")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes by case, of real engines."""
    path = tmp_path_factory.mktemp("memory") / "peaks.json"
    run_ranks(1, Path(memory_worker.__file__), path, *CASES)
    found: dict[str, int] = json.loads(path.read_text())
    return found


def predicted(case: str) -> StepMemory:
    zero_stage, precision, policy = case.split("-")
    assert precision in get_args(Precision)
    settings: Any = {"precision": precision, "policy": policy}
    return replace(step_memory(replace(SUBJECT, **settings), int(zero_stage), 1, on_cpu=True), buckets=0)


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_real_step_is_predicted(measured: dict[str, int], case: str) -> None:
    assert predicted(case).total == pytest.approx(measured[case], rel=0.02)


@pytest.mark.parametrize("policy", ["none", "mbconv", "every_block", 2])
def test_the_meta_device_has_the_live_bytes_of_a_real_one(policy: Any) -> None:
    peaks = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = create_model("coatnet_debug", num_classes=10, image_size=32).train()
        model.set_grad_checkpointing(policy=policy)
        live = LiveBytes(device, [*model.parameters(), *model.buffers()])
        with live:
            model(torch.empty(4, 32, 32, 3, device=device)).sum().backward()
        peaks.append((live.peak, live.live))
    assert peaks[0] == peaks[1]


def test_what_is_freed_no_longer_counts() -> None:
    live = LiveBytes("cpu")
    with live:
        first = torch.empty(100)
        del first
        second = torch.empty(50)
        view = second[:10]
        del second
    assert (live.live, live.peak) == (200, 400)
    del view
    assert live.live == 0


def test_policies_and_half_precision_need_less() -> None:
    sizes = [
        working_bytes(replace(SUBJECT, precision="bf16", policy=policy)) for policy in ("none", "mbconv", "every_block")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 0.6 * working_bytes(replace(SUBJECT, precision="fp32"))


def test_casts_that_live_for_all_micro_batches_count() -> None:
    subject = replace(SUBJECT, precision="bf16_autocast", micro_batch=1)
    assert working_bytes(subject, holds_casts=True) >= working_bytes(subject, holds_casts=False)


def test_ranks_share_the_state_by_the_zero_stage() -> None:
    alone, shared = (step_memory(replace(SUBJECT, precision="bf16"), 3, ranks) for ranks in (1, 8))
    assert shared.weights < alone.weights / 7
    assert shared.working == alone.working
    assert shared.total == shared.held + shared.working


def test_a_full_bucket_is_copied_to_float32_while_it_is_summed() -> None:
    """A bucket as large as the model is summed when the backward has ended and activations are gone; smaller ones
    before, beside activations.
    """
    subject = replace(SUBJECT, precision="bf16", micro_batch=1)
    parameters = count_parameters(subject.variant, subject.image_size, subject.classes)
    without = working_bytes(subject)
    whole = working_bytes(subject, copied_bucket=10**9)
    assert without < 4 * parameters <= whole < 4 * parameters + 20_000  # the images, and the loss
    parts = [working_bytes(subject, copied_bucket=size) for size in (1000, parameters // 4, parameters // 2)]
    assert without <= parts[0] <= parts[1] <= parts[2] < whole


def test_gradients_are_copied_to_be_summed_with_bf16_weights_and_zero_2_alone() -> None:
    def working(zero_stage: int, precision: Precision, gradients: Literal["fp32", "bf16"] = "fp32") -> int:
        subject = replace(SUBJECT, precision=precision, micro_batch=1)
        settings = CommunicationSettings(gradients=gradients)
        return step_memory(subject, zero_stage, 2, communication=settings).working

    assert working(2, "bf16") > working(1, "bf16") == working(2, "bf16", "bf16")
    assert working(2, "fp32") == working(1, "fp32")
