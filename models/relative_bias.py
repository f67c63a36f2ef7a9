"""The learned relative position bias: one scalar per head and displacement, no buckets (paper, section 2.1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.exporting import exporting


def expand_relative_bias(table: Tensor, grid: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """The bias of every pair of cells from the table of displacements.

    `table` (heads, 2H-1, 2W-1) holds at [h, H-1+dy, W-1+dx] the bias for a query dy rows below and dx columns right
    of its key. Returns (heads, H*W, H*W) in `dtype`, by default the table's, queries first.

    An entry of the table is used by up to H*W pairs. Its gradient is their sum in float32, or in float64 for a table of
    that, whatever `dtype` is, and is rounded once; it is computed by padding and sums, which have one order on every
    device, rather than by a scatter.
    """
    dtype = dtype or table.dtype
    if torch.is_grad_enabled() and table.requires_grad and not exporting():
        expanded: Tensor = _Expansion.apply(table, grid, dtype)  # type: ignore[no-untyped-call]
        return expanded
    return _expanded(table, grid, dtype)


class _Expansion(torch.autograd.Function):
    """`_expanded`. Autograd would add the gradient up in `dtype`, and by a scatter on GPUs."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.grid, ctx.table_dtype = grid, table.dtype
        return _expanded(table, grid, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (height, width), (gradient,) = ctx.grid, gradients
        wide = torch.float64 if ctx.table_dtype == torch.float64 else torch.float32
        # Head, query row, query column, key row, key column, the keys in reverse.
        of_pairs = gradient.reshape(-1, height, width, height, width).flip(-1, -2)
        of_columns = _sums_of_antidiagonals(of_pairs.transpose(2, 3), wide)  # head, query row, key row, dx
        by_displacement = _sums_of_antidiagonals(of_columns.permute(0, 3, 1, 2), wide).mT
        return by_displacement.to(ctx.table_dtype), None, None


def _expanded(table: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Block-Toeplitz, so a strided view of the table, with one copy for the order of the keys."""
    height, width = grid
    windows = table.to(dtype).unfold(1, height, 1).unfold(2, width, 1)
    return windows.flip(-1, -2).reshape(table.shape[0], height * width, height * width)


def _sums_of_antidiagonals(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums over i + j = s of squares (..., N, N), in `dtype`: (..., 2N-1).

    Rows of L + 1, of which the last ends N early, read as rows of L: each is shifted one place more than the one above.
    L is a multiple of 32, so that the sum has whole vectors; CPUs then add up to 16 rows one by one, as autograd would.
    """
    side = squares.shape[-1]
    length = -(-(2 * side - 1) // 32) * 32
    flat = F.pad(squares, (0, length + 1 - side)).flatten(-2)[..., :-side]
    return flat.view(*flat.shape[:-1], side, length).sum(-2, dtype=dtype)[..., : 2 * side - 1]


def resize_relative_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """`table` (heads, 2h-1, 2w-1) resized bilinearly (half-pixel centres) to (heads, 2H-1, 2W-1) for `grid` (H, W).

    As the paper does for fine-tuning at a larger size (section 4.1). A constant stays constant and displacement zero
    stays in the centre. Computed in float32 or wider, returned in the table's dtype.
    """
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if tuple(table.shape[1:]) == size:
        return table
    wide = table if table.dtype == torch.float64 else table.float()
    resized = F.interpolate(wide[None], size=size, mode="bilinear", align_corners=False)
    return resized[0].to(table.dtype)


class RelativeBias(nn.Module):
    """The table of one attention layer, trained for a grid of (H, W) cells.

    Called with a grid and a dtype it returns (heads, H*W, H*W); for another grid than the trained one the table is
    resized first. In evaluation without gradients the result is cached for the next call with the same arguments.
    """

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self._expanded: tuple[object, Tensor] | None = None

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # A compiled block expands the table as a part of its graph.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return expand_relative_bias(resize_relative_bias(self.table, grid), grid, dtype)
        # Changing the table in place increments its version; replacing its storage changes the pointer.
        key = (grid, dtype, self.table.device, self.table.data_ptr(), self.table._version)
        if self._expanded is None or self._expanded[0] != key:
            expanded = expand_relative_bias(resize_relative_bias(self.table, grid), grid, dtype)
            self._expanded = (key, expanded)
        return self._expanded[1]

    def train(self, mode: bool = True) -> "RelativeBias":
        """Switch the mode and drop the cached bias: optimizers write through views, which increment no version."""
        self._expanded = None
        return super().train(mode)
