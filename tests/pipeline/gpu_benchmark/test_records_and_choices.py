"""What follows from measurements: choices for the recipe, and the entry of efficiencies. The records are made up."""

from dataclasses import replace
from typing import Any

import pytest

from data.files.json_records import to_json, to_record
from pipeline.gpu_benchmark.choices import choices, efficiencies
from pipeline.gpu_benchmark.record import (
    OUT_OF_MEMORY,
    Device,
    EqualBits,
    GpuBenchmark,
    MicroBatchAttempt,
    OperationWork,
    StepsRun,
    Unmeasured,
    VariantRun,
)
from pipeline.gpu_benchmark.timing import Roofline
from pipeline.gpu_benchmark.variants import (
    EAGER,
    VARIANTS,
    ExecutionVariant,
    all_settings,
    is_that_of,
    loss_difference,
    unknown_setting,
)
from pipeline.recipe.schema import TrainStage

GPU = Device("NVIDIA H200", True, "2.11", "H200", 141 * 10**9, 989e12, 4.8e12)
ROOFLINE = Roofline(1e12, 1e9)


def stage(**settings: Any) -> TrainStage:
    return TrainStage.model_validate(
        {
            "resolution": 224,
            "steps": 9,
            "data": {"train": "a", "validation": "b"},
            "model": {"name": "coatnet_0"},
            "batch": {"global_size": 4096, "micro_size": 128},
            "optimizer": {"peak_learning_rate": 1e-3},
            "resources": {"ranks": 8},
            **settings,
        }
    )


def run(milliseconds: float, losses: tuple[float | None, ...] = (7.0, 6.9), peak: int = 10**10) -> StepsRun:
    return StepsRun(losses, "0" * 16, 2.0, milliseconds, 5, 1.0, peak, ROOFLINE.work(1e-3, 1, 1))


def variant(name: str, milliseconds: float, difference: float | None = 0.0, **settings: Any) -> VariantRun:
    return VariantRun(name, settings, run(milliseconds), None, difference)


def found(**changes: Any) -> GpuBenchmark:
    return GpuBenchmark(
        1, "2026-11-29", "test", "pretrain", "coatnet_0", 224, "bf16_autocast", 1000, 128, 4, 4, GPU, **changes
    )  # fmt: skip


def chosen(benchmark: GpuBenchmark, of: TrainStage | None = None) -> dict[str, Any]:
    return {choice.setting: choice.value for choice in choices(benchmark, of or stage())}


@pytest.mark.parametrize(
    ("compiled", "difference", "expected"),
    [(80.0, 0.001, True), (98.0, 0.001, False), (120.0, 0.001, False), (80.0, 0.5, False), (80.0, None, False)],
    ids=["faster", "hardly faster", "slower", "other losses", "loss not finite"],
)
def test_compilation_is_chosen_if_it_is_faster_and_its_losses_are_those_of_eager(
    compiled: float, difference: float | None, expected: bool
) -> None:
    runs = (variant("eager", 100.0, compile=False), variant("compiled", compiled, difference, compile=True))
    assert chosen(found(variants=runs)) == {"compile": expected}


def test_without_both_variants_there_is_no_choice_between_them() -> None:
    failed = VariantRun("compiled", {"compile": True}, not_run="no time was left")
    assert chosen(found(variants=(variant("eager", 100.0, compile=False), failed))) == {}
    assert chosen(found(variants=())) == {}


@pytest.mark.parametrize("own", [True, False])
def test_determinism_stays_as_it_is_and_its_price_is_named(own: bool) -> None:
    bits = (EqualBits(True, True), EqualBits(False, False, 2))
    measured = found(equal_bits=bits, cost_of_determinism=0.08)
    (choice,) = choices(measured, stage(deterministic=own))
    assert (choice.setting, choice.value, choice.writable) == ("deterministic", own, True)
    assert "true equal bits, false DIFFERENT bits; a step takes 8.0% longer with true" in choice.reason


def test_bits_that_differ_in_spite_of_the_switch_are_to_be_reported() -> None:
    (choice,) = choices(found(equal_bits=(EqualBits(True, False, 1),)), stage())
    assert "please report this" in choice.reason


def test_determinism_is_no_question_on_a_cpu() -> None:
    bits = (EqualBits(True, True), EqualBits(False, True))
    assert chosen(replace(found(equal_bits=bits), device=Device("CPU", False, "2.11"))) == {}


@pytest.mark.slow(seconds=2)
def test_recomputation_is_dropped_where_the_memory_allows_it() -> None:
    measured = found(step=run(100.0, peak=20 * 10**9), estimated_bytes=20 * 10**9)
    assert chosen(measured, stage(activation_checkpointing="every_block")) == {"activation_checkpointing": "none"}
    assert chosen(measured, stage()) == {}
    crowded = replace(measured, step=run(100.0, peak=240 * 10**9))  # twelve times the estimate, which is 12.6 GB
    assert chosen(crowded, stage(activation_checkpointing="every_block")) == {}


def test_recomputation_is_chosen_where_a_step_does_not_fit() -> None:
    full = Unmeasured("step", f"{OUT_OF_MEMORY} (CUDA out of memory)", failed=True)
    small = replace(found(unmeasured=(full,)), device=replace(GPU, memory_bytes=12 * 10**9))
    (choice,) = choices(small, stage())
    assert (choice.setting, choice.value, choice.writable) == ("activation_checkpointing", "mbconv", False)


def test_the_largest_micro_batch_is_told_and_never_written() -> None:
    attempts = (
        MicroBatchAttempt(128, True, 10, 11),
        MicroBatchAttempt(192, True, 20, 22),
        MicroBatchAttempt(256, False, 0, 33),
    )
    (choice,) = choices(found(micro_batches=attempts), stage())
    assert (choice.setting, choice.value, choice.writable) == ("batch.micro_size", 192, False)
    assert "256 does not fit" in choice.reason
    assert "a run's identity" in choice.reason


def test_the_roofline_is_the_longer_one_of_arithmetic_and_memory() -> None:
    assert ROOFLINE.work(4.0, 2 * 10**12, 10**9).least_milliseconds == 2000.0
    assert ROOFLINE.work(4.0, 10**12, 3 * 10**9).roofline_share == 0.75
    assert Roofline.of(GPU, "bf16") == Roofline(989e12, 4.8e12)
    assert Roofline.of(GPU, "fp32").work(1.0, 1, 1).least_milliseconds is None


def test_an_entry_of_efficiencies_has_each_kind_with_the_faster_form_of_attention() -> None:
    def one(kind: str, what: str, seconds: float, operations: int) -> OperationWork:
        return OperationWork(kind, what, ROOFLINE.work(seconds, operations, 10))

    entry = efficiencies(
        found(
            operations=(
                one("matmul", "S3 a", 1.0, 10**12),
                one("matmul", "S4 b", 3.0, 10**12),
                one("attention", "S3 memory-efficient", 1.0, 5 * 10**11),
                one("attention", "S3 plain", 2.0, 5 * 10**11),
                OperationWork("depthwise", "S1 c", None, "no such kernel"),
            ),
            utilization=0.3,
        )
    )
    assert entry is not None
    assert {kind: (of.teraflops, of.roofline_share) for kind, of in entry.kinds.items()} == {
        "matmul": (0.5, 0.5), "attention": (0.5, 0.5),
    }  # fmt: skip
    assert (entry.gpu, entry.date, entry.step_utilization) == ("NVIDIA H200", "2026-11-29", 0.3)
    assert efficiencies(found()) is None


def test_the_record_is_read_back_as_it_was() -> None:
    runs = (variant("eager", 100.0, compile=False), VariantRun("compiled", {"compile": True}, not_run="why"))
    whole = found(variants=runs, step=run(1.0, (None, 2.0)), equal_bits=(EqualBits(True, False, 1),))
    assert to_record(GpuBenchmark, to_json(whole)) == whole


def test_a_variant_says_all_settings_that_variants_differ_in() -> None:
    assert unknown_setting(ExecutionVariant("new", {"compile": True, "no_such_setting": True})) == "no_such_setting"
    assert all_settings(EAGER)["compile"] is False
    assert is_that_of(EAGER, stage())
    assert not is_that_of(EAGER, stage(compile=True))
    known = [one for one in VARIANTS if unknown_setting(one) is None]
    assert len({tuple(sorted(all_settings(one).items())) for one in known}) == len(known)


def test_losses_are_compared_relative_to_them() -> None:
    assert loss_difference(run(1.0, (2.0, 4.0)), run(1.0, (2.0, 5.0))) == 0.2
    assert loss_difference(run(1.0, (2.0, None)), run(1.0, (2.0, 5.0))) is None
