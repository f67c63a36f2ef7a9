"""The learned relative position bias: one scalar per head and displacement, no buckets (paper, section 2.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def expand_relative_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The bias of every pair of cells from the table of displacements.

    `table` (heads, 2H-1, 2W-1) holds at [h, H-1+dy, W-1+dx] the bias for a query dy rows below and dx columns right
    of its key. Returns (heads, H*W, H*W), queries first. The result is block-Toeplitz, so it is a strided view of
    the table: no index tensor, and its gradient needs no scatter.
    """
    height, width = grid
    windows = table.unfold(1, height, 1).unfold(2, width, 1)
    return windows.flip(-1, -2).reshape(table.shape[0], height * width, height * width)


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
            return expand_relative_bias(resize_relative_bias(self.table, grid), grid).to(dtype)
        # Changing the table in place increments its version; replacing its storage changes the pointer.
        key = (grid, dtype, self.table.device, self.table.data_ptr(), self.table._version)
        if self._expanded is None or self._expanded[0] != key:
            expanded = expand_relative_bias(resize_relative_bias(self.table, grid), grid).to(dtype)
            self._expanded = (key, expanded)
        return self._expanded[1]

    def train(self, mode: bool = True) -> "RelativeBias":
        """Switch the mode and drop the cached bias: optimizers write through views, which increment no version."""
        self._expanded = None
        return super().train(mode)
