"""What the rehearsal of a GPU counts, on devices that are here; the whole of it needs the CUDA build of torch."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.rehearsal.generated_code import read_generated_code
from benchmarks.rehearsal.roofline import Rates, count_operations, label, operation_seconds

RATES = Rates(bandwidth=1e9, matrix=1e12, matrix_float32=1e11, launch=1e-6)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "rehearsal" / "run.sh"


@pytest.mark.parametrize(
    ("name", "side", "operations", "float32", "expected"),
    [
        ("mm", 1000, 0, False, 2e-3),  # 2 MB at 1 GB/s
        ("mm", 1000, 10**10, False, 1e-2),
        ("mm", 1000, 10**10, True, 1e-1),
        ("mm", 1, 0, False, 1e-6),
        ("index_add", 1000, 0, False, 2e6 / 0.5e12),
        ("_scaled_dot_product_efficient_attention", 1, 15 * 10**10, False, 1e-3),
    ],
)
def test_an_operation_takes_as_long_as_its_bytes_its_arithmetic_or_a_launch(
    name: str, side: int, operations: int, float32: bool, expected: float
) -> None:
    tensor = torch.empty(side, side, dtype=torch.bfloat16, device="meta")
    size, seconds = operation_seconds(name, [tensor], operations, float32=float32, rates=RATES)
    assert size == 2 * side**2
    assert seconds == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("groups", "kind", "operations"), [(1, "dense", 2 * 4 * 8 * 8 * 4 * 9), (4, "depthwise", 0)])
def test_convolutions_are_told_apart(groups: int, kind: str, operations: int) -> None:
    x = torch.empty(1, 4, 8, 8, device="meta")
    weight = torch.empty(4, 4 // groups, 3, 3, device="meta")
    convolution = torch.ops.aten.convolution.default
    arguments: tuple[Any, ...] = (x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), groups)
    assert label(convolution, arguments) == f"convolution {kind}"
    result = convolution(*arguments)
    assert count_operations(convolution, f"convolution {kind}", arguments, {}, result) == operations


def test_generated_code_is_read() -> None:
    code = (
        "triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''\ntl.store(x)\n''', device_str='cuda')\n"
        "triton_red_fused_1 = async_compile.triton('triton_red_fused_1', '''\ntl.atomic_add(x)\ntl.atomic_add(y)\n'''"
        ", device_str='cuda')\n"
        "extern_kernels.mm(a, b, out=c)\nextern_kernels.mm(a, b, out=c)\ntorch.ops.aten.convolution.default(x)\n"
    )
    graph = read_generated_code(code)
    assert [kernel.name for kernel in graph.kernels] == ["triton_poi_fused_0", "triton_red_fused_1"]
    assert [kernel.atomics for kernel in graph.kernels] == [0, 2]
    assert graph.atomics == 2
    assert graph.calls == {"extern_kernels.mm": 2, "torch.ops.aten.convolution.default": 1}


def test_the_script_names_its_commands() -> None:
    result = subprocess.run(["bash", str(SCRIPT), "guess"], capture_output=True, text=True)
    assert result.returncode == 78
    assert "step|lower" in result.stderr
