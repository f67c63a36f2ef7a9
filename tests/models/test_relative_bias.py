"""The relative bias: its expansion, its gradient, its resize, and attention with it."""

import pytest
import torch
from torch import Tensor

from models.relative_bias import RelativeBias, expand_relative_bias, resize_relative_bias
from tests.support.operators import Recorded

GRIDS = [(1, 1), (2, 2), (3, 5), (7, 7)]


def gathered(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The definition: bias[query, key] = table[query row - key row + H - 1, query column - key column + W - 1]."""
    height, width = grid
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return table[:, rows[:, None] - rows[None] + height - 1, columns[:, None] - columns[None] + width - 1]


@pytest.mark.parametrize("grid", GRIDS)
def test_expansion_and_its_gradient_equal_the_definition(grid: tuple[int, int]) -> None:
    shape = (3, 2 * grid[0] - 1, 2 * grid[1] - 1)
    ours, plain = (torch.arange(float(torch.Size(shape).numel())).reshape(shape).requires_grad_() for _ in range(2))
    weights = torch.randn(3, grid[0] * grid[1], grid[0] * grid[1], dtype=torch.float32).round()
    expanded = expand_relative_bias(ours, grid)
    assert torch.equal(expanded, gathered(plain, grid))
    (ours_gradient,) = torch.autograd.grad((expanded * weights).sum(), [ours])
    (plain_gradient,) = torch.autograd.grad((gathered(plain, grid) * weights).sum(), [plain])
    assert torch.equal(ours_gradient, plain_gradient)


def relative_error(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient.double() - exact).norm() / exact.norm())


def test_the_gradient_of_a_bf16_bias_is_summed_in_float32() -> None:
    """Of 196 terms that are summed in bf16 the gradient loses more than by one rounding to bf16."""
    grid, cells = (14, 14), 196
    table, gradient = torch.randn(4, 27, 27).bfloat16(), torch.randn(4, cells, cells).bfloat16()
    wide = table.double().requires_grad_()
    (exact,) = torch.autograd.grad(gathered(wide, grid), wide, gradient.double())

    def error(kind: torch.dtype, dtype: torch.dtype) -> float:
        leaf = table.to(kind).requires_grad_()
        expanded = expand_relative_bias(leaf, grid, dtype)
        assert torch.equal(expanded, gathered(table, grid).to(dtype))
        (found,) = torch.autograd.grad(expanded, leaf, gradient.to(dtype))
        assert found.dtype == kind
        return relative_error(found, exact)

    leaf = table.clone().requires_grad_()
    (in_bf16,) = torch.autograd.grad(
        leaf.unfold(1, 14, 1).unfold(2, 14, 1).flip(-1, -2).reshape(4, 196, 196), leaf, gradient
    )
    rounding = relative_error(exact.bfloat16(), exact)
    assert error(torch.float32, torch.bfloat16) < 1e-6
    assert error(torch.bfloat16, torch.bfloat16) < 1.01 * rounding < relative_error(in_bf16, exact) / 2


def test_the_gradient_is_computed_without_a_scatter() -> None:
    table = torch.randn(2, 5, 7, requires_grad=True)
    expanded = expand_relative_bias(table, (3, 4), torch.bfloat16)
    with Recorded() as seen:
        torch.autograd.grad(expanded, table, torch.ones_like(expanded))
    assert {"constant_pad_nd", "sum"} <= seen.counts.keys()
    assert not [name for name in seen.counts if "scatter" in name or "index" in name or "unfold" in name], seen.counts


def test_dynamo_that_takes_torch_compile_for_an_export_keeps_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    # As that of torch 2.11 does.
    for name in ("is_exporting", "is_dynamo_compiling"):
        monkeypatch.setattr(torch.compiler, name, lambda: True)
    expanded = expand_relative_bias(torch.zeros(2, 3, 3, requires_grad=True), (2, 2))
    assert expanded.grad_fn is not None
    assert expanded.grad_fn.name() == "_ExpansionBackward"
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: False)
    exported = expand_relative_bias(torch.zeros(2, 3, 3, requires_grad=True), (2, 2))
    assert exported.grad_fn is not None
    assert exported.grad_fn.name() != "_ExpansionBackward"


@pytest.mark.parametrize(("before", "after"), [((2, 2), (3, 3)), ((7, 7), (12, 12)), ((4, 6), (8, 3))])
def test_resize_keeps_a_constant_and_the_centre(before: tuple[int, int], after: tuple[int, int]) -> None:
    constant = torch.full((2, 2 * before[0] - 1, 2 * before[1] - 1), 0.75)
    resized = resize_relative_bias(constant, after)
    assert resized.shape == (2, 2 * after[0] - 1, 2 * after[1] - 1)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.75), rtol=1e-6, atol=0)  # bilinear weights round
    # A table that is odd about displacement zero stays odd, so zero stays in the centre.
    odd = torch.randn(1, 2 * before[0] - 1, 2 * before[1] - 1)
    odd = odd - odd.flip(1, 2)
    resized = resize_relative_bias(odd, after)
    torch.testing.assert_close(resized, -resized.flip(1, 2))


@pytest.mark.parametrize("grid", [(2, 3), (4, 2), (3, 3)])
def test_expansion_and_resize_pass_the_numeric_gradient_check(grid: tuple[int, int]) -> None:
    table = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: expand_relative_bias(resize_relative_bias(t, grid), grid), table)


def test_resize_from_224_to_384_to_512_follows_linear_interpolation() -> None:
    """A table that is linear in the displacement stays linear, but at the rim, where half-pixel centres clamp."""
    ramp = torch.arange(-13.0, 14.0).expand(1, 27, 27) / 13.5
    for side in (24, 32):
        ramp = resize_relative_bias(ramp, (side, side))
        expected = torch.arange(-(side - 1.0), side) / (side - 0.5)
        torch.testing.assert_close(ramp[0, 0, 3:-3], expected[3:-3], rtol=0, atol=1e-6)
        assert ramp[0, 5, side - 1].abs() < 1e-6


def filled(heads: int, grid: tuple[int, int]) -> RelativeBias:
    bias = RelativeBias(heads, grid)
    torch.nn.init.normal_(bias.table)
    return bias


def test_module_returns_queries_first() -> None:
    bias = RelativeBias(1, (2, 1))
    with torch.no_grad():
        bias.table.copy_(torch.tensor([[[1.0], [2.0], [3.0]]]))  # displacements -1, 0, +1 of the query from the key
    assert torch.equal(bias((2, 1), torch.float32)[0], torch.tensor([[2.0, 1.0], [3.0, 2.0]]))


def test_another_grid_uses_the_resized_table() -> None:
    bias = filled(2, (3, 4))
    expected = expand_relative_bias(resize_relative_bias(bias.table, (6, 2)), (6, 2))
    assert torch.equal(bias((6, 2), torch.float32), expected)
    assert bias((6, 2), torch.bfloat16).dtype == torch.bfloat16


def test_evaluation_caches_the_expanded_table_and_training_does_not() -> None:
    bias = filled(2, (3, 4)).eval()
    with torch.no_grad():
        kept = bias((3, 4), torch.float32)
        assert bias((3, 4), torch.float32) is kept
        assert bias((4, 4), torch.float32).shape == (2, 16, 16)
        assert bias((3, 4), torch.bfloat16).dtype == torch.bfloat16
    assert bias((3, 4), torch.float32).requires_grad
    with torch.no_grad():
        assert bias.train()((3, 4), torch.float32) is not bias((3, 4), torch.float32)


@pytest.mark.parametrize("change", ["in place", "loaded", "other storage", "an optimizer's view, then eval again"])
def test_a_changed_table_is_expanded_anew(change: str) -> None:
    bias = filled(1, (2, 2)).eval()
    with torch.no_grad():
        bias((2, 2), torch.float32)
        if change == "in place":
            bias.table.add_(1.0)
        elif change == "loaded":
            bias.load_state_dict(filled(1, (2, 2)).state_dict())
        elif change == "other storage":
            bias.table.data = torch.randn(1, 3, 3)
        else:
            bias.train()
            bias.table.data.add_(1.0)
            bias.eval()
        assert torch.equal(bias((2, 2), torch.float32), expand_relative_bias(bias.table, (2, 2)))
