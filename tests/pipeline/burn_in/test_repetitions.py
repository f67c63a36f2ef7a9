"""A micro-batch computed again and again on this machine's processor."""

from pathlib import Path

import pytest
import torch

from pipeline.burn_in import repetitions
from pipeline.burn_in.repetitions import burn_in
from pipeline.burn_in.verdict import DeviceBits
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import TrainPlan, plan_stage
from pipeline.preflight.assessment import not_compared
from pipeline.preflight.nodes import _NodeChecks
from pipeline.preflight.report import read_report
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from tests.support.recipes import write_recipe

CPU = torch.device("cpu")


def plan_of(folder: Path, shards: Path, *overrides: str) -> TrainPlan:
    plan = plan_stage(load_recipe(write_recipe(folder, shards), ["finetune.start_from=null", *overrides]), "finetune")
    assert isinstance(plan, TrainPlan)
    return plan


def burned(plan: TrainPlan) -> DeviceBits:
    return burn_in(plan, CPU, where="rank 0 on n1", node="n1", seconds=0.0)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_repetitions_have_equal_bits_whatever_is_recomputed(shards: Path, tmp_path: Path, precision: str) -> None:
    results = set()
    for policy in ("none", "every_block"):
        found = burned(plan_of(tmp_path, shards, f"precision={precision}", f"activation_checkpointing={policy}"))
        assert found.repetitions == repetitions.LEAST_REPETITIONS
        (bits,) = found.bits
        assert [part.partition("=")[0] for part in bits.split()] == ["loss", "gradient", "statistics"]
        results.add(bits)
    assert len(results) == 1


@pytest.mark.slow(seconds=2)
def test_the_seed_and_the_threads_decide_what_is_compared(shards: Path, tmp_path: Path) -> None:
    one, other = (burned(plan_of(tmp_path, shards, f"seed={seed}")) for seed in (0, 1))
    assert one.bits != other.bits
    assert one.kind == other.kind
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert burned(plan_of(tmp_path, shards)).kind != one.kind
    finally:
        torch.set_num_threads(before)


def test_gpus_without_deterministic_algorithms_are_not_compared_and_that_is_said(shards: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, shards, "resources.ranks=1", "resources.gpus_per_rank=1", "deterministic=false")
    report = tmp_path / "report.jsonl"
    watchdog = Watchdog(plan.stage.watchdog, 0, 1, "n1", tmp_path / "log", lambda *_: pytest.fail("it hangs"))
    _NodeChecks(Ranks(0, 1, CPU), "n1", watchdog, report).burn_in(plan, 600.0)
    ((finding,), _) = read_report(report)
    assert finding == not_compared("finetune")
    assert finding.what == (
        "burn-in: none, since without deterministic GPUs compute other bits each time; deterministic=true has one"
    )


def test_a_full_memory_is_reported_and_another_error_is_not_taken_for_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(repetitions, "build_model", fail)
    plan = plan_of(tmp_path, shards)
    found = burned(plan)
    assert (found.problem, found.bits) == ("the memory of the GPU is full (CUDA out of memory)", {})
    error = RuntimeError("an illegal instruction was encountered")
    with pytest.raises(RuntimeError, match="an illegal instruction"):
        burned(plan)
