"""The roofline, against arithmetic by hand, and the file of efficiencies."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.planner.figures import Figure, read_figures
from pipeline.planner.pricing import (
    EfficiencyFile,
    GpuModel,
    bundled_efficiencies,
    gpu_model,
    seconds,
    seconds_by_kind,
    seconds_range,
    total_seconds,
)
from pipeline.planner.trace.operations import Access, Kind, Operation, Product, Scores, Taps
from pipeline.ranks.gpus import FLOAT32_PEAKS, PEAKS, memory_bandwidth


def figure(value: Any, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    return {"value": value, "least": least, "most": most, "origin": "made up"}


LAW = {
    "tile_columns": figure(64), "tile_depth": figure(16), "attention_tile": figure(64), "flash": figure(0.5),
    "biased": figure(0.25), "softmax": figure(10), "depthwise_taps": figure(0.5), "depthwise_memory": figure(0.5),
    "strided_memory": figure(0.25), "float32_matmul": figure(0.5), "launch": figure(1e-12), "error": figure(1, 0.5, 2),
}  # fmt: skip
OTHER = {"matmul": figure(0.5, 0.25, 1.0), "memory": figure(0.5, 0.25, 1.0), "eager": figure(2.0, 1.0, 4.0)}
CONTENT = read_figures(
    EfficiencyFile, yaml.safe_dump({"version": 1, "law": LAW, "gpus": {}, "other": OTHER}), "efficiencies.yaml"
)


@pytest.fixture
def gpu() -> GpuModel:
    """100 and 10 GFLOP/s, 1 GB/s; half of each is reached."""
    return replace(gpu_model("H100", CONTENT), peak=100e9, float32_peak=10e9, bandwidth=1e9)


def operation(kind: Kind, work: Any = None, size: int = 0, **facts: Any) -> Operation:
    return Operation(kind, "x", (Access(1, size),), (), work, **facts)


def test_a_pass_takes_its_bytes(gpu: GpuModel) -> None:
    assert seconds(operation("elementwise", size=1000), gpu) == 1000 / 0.5e9


def test_other_orders_move_bytes_slower(gpu: GpuModel) -> None:
    assert seconds(operation("copy", size=1000, strided=True), gpu) == 1000 / 0.125e9


def test_a_product_takes_its_arithmetic_or_its_bytes_whichever_is_longer(gpu: GpuModel) -> None:
    product = Product(1, 64, 64, 64)
    assert seconds(operation("matmul", product, size=10), gpu) == product.flops / 50e9
    assert seconds(operation("matmul", product, size=10**6), gpu) == 10**6 / 0.5e9


@pytest.mark.parametrize(
    ("columns", "padded"), [(64, 64), (65, 128), (96, 128), (32, 32), (33, 64), (1000, 1024), (5, 8)]
)
def test_columns_of_a_product_are_padded_to_whole_tiles(gpu: GpuModel, columns: int, padded: int) -> None:
    assert seconds(operation("matmul", Product(1, 64, columns, 64)), gpu) == 2 * 64 * 64 * padded / 50e9


def test_the_depth_of_a_product_is_padded_to_whole_instructions(gpu: GpuModel) -> None:
    assert seconds(operation("matmul", Product(1, 64, 64, 27)), gpu) == 2 * 64 * 64 * 32 / 50e9


def test_float32_does_without_tensor_cores(gpu: GpuModel) -> None:
    product = Product(1, 64, 60, 60)
    assert seconds(operation("matmul", product, in_float32=True), gpu) == product.flops / 5e9


def test_channels_first_convolutions_convert_their_tensors(gpu: GpuModel) -> None:
    product = Product(1, 64, 64, 64)
    last = seconds(operation("convolution", product, size=1000), gpu)
    first = seconds(operation("convolution", product, size=1000, channels_last=False), gpu)
    assert first == last + 1000 / 0.5e9


def test_attention_pads_queries_and_keys_and_takes_its_softmax_too(gpu: GpuModel) -> None:
    scores = 2 * 128 * 128
    expected = 2 * 2 * scores * 32 / 25e9 + scores * 10 / 10e9
    assert seconds(operation("attention", Scores(2, 100, 70, 32, 2, False)), gpu) == pytest.approx(expected, rel=1e-12)
    biased = seconds(operation("attention", Scores(2, 100, 70, 32, 2, True)), gpu)
    assert biased == pytest.approx(4 * expected, rel=1e-12)


def test_depthwise_convolutions_are_slower_passes_or_limited_by_their_taps(gpu: GpuModel) -> None:
    work = Taps(1000, 9)
    assert seconds(operation("depthwise", work, size=10), gpu) == work.flops / 5e9
    assert seconds(operation("depthwise", work, size=10**6), gpu) == 10**6 / 0.25e9


def test_no_kernel_is_faster_than_its_launch(gpu: GpuModel) -> None:
    slow = gpu.law.model_copy(update={"launch": Figure(value=1.0, origin="made up")})
    assert seconds(operation("elementwise", size=1), replace(gpu, law=slow)) == 1.0


def test_eager_kernels_take_the_factor_of_the_gpu(gpu: GpuModel) -> None:
    operations = [operation("elementwise", size=1000), operation("copy", size=3000)]
    compiled = total_seconds(operations, gpu, compiled=True)
    assert total_seconds(operations, gpu, compiled=False) == 2 * compiled == 2 * 4000 / 0.5e9
    assert list(seconds_by_kind(operations, gpu, compiled=True)) == ["copy", "elementwise"]


def test_the_range_has_the_ends_of_the_efficiencies_and_the_error_of_the_law(gpu: GpuModel) -> None:
    operations = [operation("elementwise", size=1000)]
    assert seconds_range(operations, gpu, compiled=True) == (0.5 * 1000 / 1e9, 2 * 1000 / 0.25e9)
    assert seconds_range(operations, gpu, compiled=False) == (0.5 * 1000 / 1e9, 2 * 4 * 1000 / 0.25e9)


def test_every_gpu_has_all_three_peaks_and_an_efficiency() -> None:
    assert PEAKS.keys() == FLOAT32_PEAKS.keys()
    for kind in PEAKS:
        assert gpu_model(kind).bandwidth == memory_bandwidth(kind)
    assert set(bundled_efficiencies().gpus) <= PEAKS.keys()


def test_a_full_name_tells_the_memory_apart() -> None:
    small, large = gpu_model("A100"), gpu_model("NVIDIA A100-SXM4-80GB")
    assert small.kind == large.kind == "A100"
    assert (small.bandwidth, large.bandwidth) == (1.555e12, 2.039e12)


def test_a_gpu_is_measured_if_none_of_its_efficiencies_has_a_range() -> None:
    assert gpu_model("RTX 4090").measured
    assert not gpu_model("H100").measured
    assert gpu_model("L40S").efficiency == bundled_efficiencies().other


def test_every_figure_of_the_file_has_an_origin_and_lies_in_its_range() -> None:
    content = bundled_efficiencies()
    sections = [content.law, content.other, *content.gpus.values()]
    figures = [getattr(section, name) for section in sections for name in type(section).model_fields]
    assert len(figures) == len(LAW) + 3 * (1 + len(content.gpus))
    for one in figures:
        assert len(one.origin) > 5
        assert one.least is None or one.least <= one.value
        assert one.most is None or one.value <= one.most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "x"}, "version"),
        ({"law": {**LAW, "flash": {"value": 1}}}, "law.flash.origin"),
        ({"law": {**LAW, "flash": figure("fast")}}, "law.flash.value"),
        ({"law": {**LAW, "flush": figure(1)}}, "law.flush"),
        ({"gpus": {"H100": {"matmul": figure(1)}}}, "gpus.H100.memory"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(change: dict[str, Any], message: str) -> None:
    text = yaml.safe_dump({"version": 1, "law": LAW, "gpus": {}, "other": OTHER, **change})
    with pytest.raises(ConfigError, match=f"mine.yaml: {message}"):
        read_figures(EfficiencyFile, text, "mine.yaml")


def test_a_file_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        read_figures(EfficiencyFile, "law: [", "efficiencies.yaml")


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"GPU T4: not in the table; use one of GB200, .*RTX 4090"):
        gpu_model("T4")
