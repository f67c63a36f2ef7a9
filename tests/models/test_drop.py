"""Stochastic depth gathers samples, forward and backward, with the bits of index_select and index_add."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import TransformerBlock
from models.drop import Kept, draw_kept
from models.mbconv import MBConv
from models.registry import create_model
from models.variants import VARIANTS
from tests.support.operators import Recorded

DEBUG = VARIANTS["coatnet_debug"]
CPU = torch.device("cpu")
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def draws(rate: float, batch: int, seed: int = 0) -> Kept:
    torch.manual_seed(seed)
    (draw,) = draw_kept([rate], batch, CPU)
    return draw


def residual(x: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    return kept.add(x, kept.of(x) * branch[kept.samples])


def residual_of_all(x: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    return kept.add_computed_for_all(x, x * branch)


def plain_residual(x: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    rows = x.index_select(0, kept.samples) * branch[kept.samples]
    return x.index_add(0, kept.samples, (rows * kept.scale).to(x.dtype))


def plain_residual_of_all(x: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    rows = (x * branch).index_select(0, kept.samples)
    return x.index_add(0, kept.samples, (rows * kept.scale).to(x.dtype))


PAIRS = [(residual, plain_residual), (residual_of_all, plain_residual_of_all)]


@pytest.mark.parametrize(("ours", "plain"), PAIRS, ids=["of-kept", "of-all"])
@pytest.mark.parametrize("rate", [0.05, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (BFLOAT, FLOAT), (FLOAT, BFLOAT)], ids=str)
def test_values_and_gradients_equal_those_of_index_add_to_the_bit(
    dtypes: tuple[torch.dtype, torch.dtype], rate: float, ours: Any, plain: Any
) -> None:
    kept = draws(rate, 16)
    torch.manual_seed(1)
    x, branch = (torch.randn(16, 3, 3, 5).to(dtype).requires_grad_() for dtype in dtypes)
    x.data[:, 0, 0] = -0.0
    found, expected = ours(x, branch, kept), plain(x, branch, kept)
    assert found.dtype == expected.dtype
    upstream = torch.randn(expected.shape).to(expected.dtype)
    pairs = zip(
        (found, *torch.autograd.grad(found, (x, branch), upstream)),
        (expected, *torch.autograd.grad(expected, (x, branch), upstream)),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_sample_that_is_not_kept_keeps_its_negative_zeros_and_ignores_other_samples() -> None:
    kept = draws(0.5, 8)
    dropped = kept.factors == 0
    assert 0 < dropped.sum() < 8
    y = kept.add(torch.full((8, 2), -0.0), torch.full((len(kept.samples), 2), float("nan")))
    assert torch.equal(torch.signbit(y[dropped]), torch.ones_like(y[dropped], dtype=torch.bool))
    assert y[~dropped].isnan().all()


@pytest.mark.parametrize("ours", [residual, residual_of_all])
def test_the_numeric_gradient_check_passes(ours: Any) -> None:
    kept = draws(0.4, 6)
    x, branch = (torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, branch: ours(x, branch, kept), (x, branch))


def test_a_draw_has_the_inverse_of_its_samples() -> None:
    torch.manual_seed(0)
    for kept in draw_kept([0.0, 0.3, 0.9, 1 - 1e-12], 10, CPU):
        count = len(kept.samples)
        assert torch.equal(kept.places[kept.samples], torch.arange(count))
        others = sorted(set(range(10)) - set(kept.samples.tolist()))
        assert kept.places[others].tolist() == [count] * (10 - count)
        assert kept.factors[kept.samples].tolist() == [kept.scale.item()] * count
        assert not kept.factors[others].any()


def writes_by_index(names: set[str]) -> list[str]:
    parts = ("index_add", "index_put", "scatter", "index_copy", "index_select_backward", "put_")
    return sorted(name for name in names if any(part in name for part in parts))


def train(model: torch.nn.Module, *inputs: Any) -> set[str]:
    with Recorded() as recorded:
        model(*inputs).sum().backward()
    return set(recorded.counts)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["mbconv", "transformer"])
def test_no_operator_of_a_training_step_of_a_block_writes_by_index(kind: str, stride: int, dtype: torch.dtype) -> None:
    block = (
        MBConv(16, 16, stride=stride, variant=DEBUG)
        if kind == "mbconv"
        else TransformerBlock(16, 16, stride=stride, grid=(4, 4), variant=DEBUG)
    )
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
    torch.manual_seed(0)
    kept = tuple(draw_kept([0.5] * block.branches, 6, CPU))
    x = torch.randn(6, 4 * stride, 4 * stride, 16, dtype=dtype, requires_grad=True)
    names = train(block, x, kept)
    # The backward of pooling writes by index too, within its own kernel, which is deterministic.
    assert writes_by_index(names) == []
    assert "mul" in names  # the record is of what ran
    assert writes_by_index(train(PlainBlock(), x, kept)) != []


class PlainBlock(torch.nn.Module):
    """What the record must find."""

    def forward(self, x: Tensor, kept: tuple[Kept, ...]) -> Tensor:
        return plain_residual(x, torch.ones_like(x), kept[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_stochastic_depth_trains_on_the_meta_device(checkpointing: bool) -> None:
    with torch.device("meta"):
        model = create_model("coatnet_debug", num_classes=3, image_size=32, drop_path_rate=0.3)
    model.set_grad_checkpointing(checkpointing)
    names = train(model, torch.empty(4, 32, 32, 3, device="meta"))
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert writes_by_index(names) == []


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("ours", [residual, residual_of_all])
def test_compiled_it_is_one_graph_for_every_number_of_kept_samples(ours: Any) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=False)
    x, branch = (torch.randn(16, 2, 2, requires_grad=True) for _ in range(2))
    for seed in range(3):
        kept = draws(0.5, 16, seed)
        torch._dynamo.maybe_mark_dynamic(kept.samples, 0)
        for one, other in zip(
            torch.autograd.grad(compiled(x, branch, kept).square().sum(), (x, branch)),  # type: ignore[no-untyped-call]
            torch.autograd.grad(ours(x, branch, kept).square().sum(), (x, branch)),
            strict=True,
        ):
            assert torch.equal(one, other)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_compiled_forwards_have_the_same_bits_and_write_into_no_tensor(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch 2.11 compiles a gradient of zeros for a function whose result was written into.
    kept = draws(0.5, 8)
    x, branch = torch.randn(8, 3, 4, dtype=dtype), torch.randn(8, 3, 4, dtype=dtype)
    eager = residual(x, branch, kept), residual_of_all(x, branch, kept)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with _Written() as written:
        compiled = residual(x, branch, kept), residual_of_all(x, branch, kept)
    assert all(torch.equal(ours, plain) for ours, plain in zip(compiled, eager, strict=True))
    assert written.names == []


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of operators that write into a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function._schema.is_mutable:
            self.names.append(str(function))
        return function(*arguments, **(keywords or {}))
