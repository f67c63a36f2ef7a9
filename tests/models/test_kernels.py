"""The Triton kernels of MBConv without a GPU: interpreted, they compute what plain torch does; and they compile."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is for Linux alone")
pytestmark = pytest.mark.slow(seconds=30)

WORKER = Path(__file__).with_name("interpreted_kernels.py")
CASES = ["fp32-tanh", "fp32-exact-stride-2", "bf16-tanh-stride-2", "bf16-exact"]
RESULTS = (
    "result", "mean", "convolution", "statistics", "x", "scale 1", "shift 1", "weight", "scale 2", "shift 2"
)  # fmt: skip


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("kernels") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, WORKER, file], env=environment, check=True)
    found: dict[str, Any] = torch.load(file)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_what_plain_torch_computes(interpreted: dict[str, Any], case: str) -> None:
    kernels, plain = interpreted["cases"][CASES.index(case)]
    for name, ours, expected in zip(RESULTS, kernels, plain, strict=True):
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), name
        difference = (ours.double() - expected.double()).abs()
        # Of the greatest value: in float32 the order of additions, which may round a bfloat16 to its other neighbour.
        tolerance = 1e-5 if ours.dtype == torch.float32 else 2**-7
        assert float(difference.max() / expected.double().abs().max()) < tolerance, name
        if ours.dtype == torch.bfloat16:
            assert float((ours != expected).double().mean()) < 0.01, name


def test_a_training_step_passes_sixteen_times_over_wide_tensors(interpreted: dict[str, Any]) -> None:
    """As docs/gpus.md counts them: reads and writes by each launch, at stride 1, where all wide tensors have one size."""
    assert interpreted["passes"] == {
        "moments": [1], "depthwise": [2], "activate": [2],
        "activate_backward": [2], "input_gradient": [3, 3], "depthwise_backward": [3],
    }  # fmt: skip


def test_the_variance_of_values_far_from_zero_keeps_its_digits(interpreted: dict[str, Any]) -> None:
    """Against float64; the difference of mean square and squared mean has none of them."""
    values, mean, variance = (interpreted["far"][name] for name in ("values", "mean", "variance"))

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(0, 2)
        return x.mean(0), x.square().mean(0) - x.mean(0).square()

    exact = values.double().flatten(0, 2).var(0, correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.double(), moments(values.double())[0], rtol=1e-6, atol=0)
    assert ((moments(values)[1] - exact).abs() > exact / 2).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 2, 4), torch.float64, "of torch.float64: the kernels take torch.float32, torch.bfloat16"),
        ((1, 2**14, 2**14, 16), torch.float32, "the kernels take images of less than 2\\^31 elements"),
    ],
)
def test_other_dtypes_and_images_are_refused(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    from models.kernels.launch import forward

    x, one = torch.empty(shape, dtype=dtype, device="meta"), torch.ones(1)
    with pytest.raises(ValueError, match=message):
        forward(x, one, one, one, one, one, 1e-3, 1e-3, 1, "tanh")


@pytest.mark.parametrize(
    ("name", "architecture", "tanh"),
    [
        ("moments", 90, True), ("depthwise", 90, True), ("activate", 90, True), ("activate_backward", 90, True),
        ("input_gradient", 90, True), ("input_gradient, activated", 90, True), ("depthwise_backward", 90, True),
        ("depthwise, stride 2", 80, False), ("depthwise_backward, stride 2", 80, False),
    ],
)  # fmt: skip
def test_the_kernels_compile_for_gpus_and_spill_no_registers(
    name: str, architecture: int, tanh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.kernel_resources import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(name, architecture, tanh=tanh, dtype="bf16")
    assert found.spilled == 0
    assert found.shared <= 16_384
    # Below a quarter of an SM's warps, loads would wait for memory.
    assert found.warps >= 16
