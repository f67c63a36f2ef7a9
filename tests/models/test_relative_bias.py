"""The relative bias: its expansion, its gradient, its resize, and attention with it."""

import pytest
import torch
from torch import Tensor

from models.attention import RelativeAttention
from models.relative_bias import RelativeBias, expand_relative_bias, resize_relative_bias

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
    (expanded * weights).sum().backward()
    (gathered(plain, grid) * weights).sum().backward()
    assert torch.equal(ours.grad, plain.grad)


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


def test_attention_equals_the_formula_with_its_gradients() -> None:
    torch.manual_seed(0)
    grid = (3, 4)
    attention = RelativeAttention(12, 16, 8, grid).double()
    torch.nn.init.normal_(attention.relative_bias.table)
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)

    q, k, v = (t.reshape(2, 12, 2, 8).transpose(1, 2) for t in attention.qkv(x).reshape(2, 12, 48).chunk(3, dim=-1))
    scores = q @ k.transpose(-1, -2) * 8**-0.5 + gathered(attention.relative_bias.table, grid)
    plain = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, *grid, 16))
    ours = attention(x)

    torch.testing.assert_close(ours, plain)
    inputs = (x, attention.relative_bias.table)
    weights = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_gradients_pass_the_numeric_check() -> None:
    table = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: expand_relative_bias(t, (2, 3)), table)


def test_module_returns_queries_first() -> None:
    bias = RelativeBias(1, (2, 1))
    with torch.no_grad():
        bias.table.copy_(torch.tensor([[[1.0], [2.0], [3.0]]]))  # displacements -1, 0, +1 of the query from the key
    assert torch.equal(bias()[0], torch.tensor([[2.0, 1.0], [3.0, 2.0]]))
