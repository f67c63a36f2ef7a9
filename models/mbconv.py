"""The MBConv block: inverted bottleneck with a depthwise convolution and squeeze-and-excitation, pre-activation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.drop import Kept
from models.fused_depthwise import fused_depthwise
from models.norm import BatchNorm, convolution_norm
from models.options import APPROXIMATION
from models.pool import pool_by_two
from models.variants import Variant

EXPANSION = 4
SQUEEZE = 0.25


class SqueezeExcitation(nn.Module):
    """A gate for each channel from its mean over an image, (B, C) -> (B, C) (Hu et al., arXiv 1709.01507)."""

    def __init__(self, width: int, squeezed_width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, squeezed_width)
        self.excite = nn.Linear(squeezed_width, width)

    def forward(self, mean_BC: Tensor) -> Tensor:
        gate_BC: Tensor = self.excite(F.silu(self.squeeze(mean_BC)))
        return gate_BC.sigmoid()


class GatedLinear(nn.Linear):
    """`Linear(x * gate)` for channels-last images and a gate for each of their channels.

    For an image with more cells than the layer has outputs, the gate is applied to the weights instead of the cells.
    That saves several passes over the widest activations of the model, forward and backward, and storing one of them.
    """

    def forward(self, x_BHWC: Tensor, gate_BC: Tensor) -> Tensor:  # type: ignore[override]
        B, H, W, _ = x_BHWC.shape
        if self.out_features >= H * W:
            return super().forward(x_BHWC * gate_BC[:, None, None, :])
        weight_BCD = gate_BC[:, :, None] * self.weight.t()
        return torch.baddbmm(self.bias, x_BHWC.flatten(1, 2), weight_BCD).reshape(B, H, W, -1)


class MBConv(nn.Module):
    """`Proj(Pool(x)) + Shrink(SE(DepthConv(Expand(Norm(x), stride))))` (paper, equation 5).

    With the stride in the 1x1 expansion, that reads a quarter of the pixels. Expansion and squeeze are relative to the
    OUTPUT width: only that gives the published sizes and multiply-adds.

    Args:
        in_width, width: channels in and out.
        stride: 1 or 2.
        variant: has the options.
    """

    branches = 1
    """Residual branches that stochastic depth can drop."""

    def __init__(self, in_width: int, width: int, *, stride: int, variant: Variant) -> None:
        super().__init__()

        def norm(width: int) -> nn.Module:
            return convolution_norm(width, variant)

        hidden = EXPANSION * width
        self.stride = stride
        self.pool = variant.pool
        self.gelu = APPROXIMATION[variant.gelu]
        self.expansion_stride = stride if variant.stride_in == "expansion" else 1
        depthwise_stride = stride // self.expansion_stride
        self.shortcut = nn.Linear(in_width, width) if in_width != width else nn.Identity()
        self.norm = norm(in_width)
        self.expand = nn.Linear(in_width, hidden, bias=False)
        self.expand_norm = norm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, depthwise_stride, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = norm(hidden)
        self.squeeze_excitation = SqueezeExcitation(hidden, max(1, int(SQUEEZE * width)))
        self.shrink = GatedLinear(hidden, width)
        self.fused = False
        """Whether training computes what is between `expand` and `shrink` by `fused_depthwise`."""

    def forward(self, x_BHWC: Tensor, kept: tuple[Kept, ...] | None = None) -> Tensor:
        """(B, H, W, in_width) -> (B, H/stride, W/stride, width); `kept` has one entry."""
        shortcut: Tensor = self.shortcut(pool_by_two(x_BHWC, self.pool) if self.stride == 2 else x_BHWC)
        y: Tensor = self.norm(x_BHWC)[:, :: self.expansion_stride, :: self.expansion_stride]
        y, mean_BC = self.convolve(self.expand(y))
        y = self.shrink(y, self.squeeze_excitation(mean_BC))
        # All samples are computed, for BatchNorm's statistics.
        return shortcut + y if kept is None else kept[0].add_computed_for_all(shortcut, y)

    def convolve(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """What is between `expand` and `shrink`, and its mean over pixels (B, hidden)."""
        if self.fused and self.training:
            assert isinstance(self.expand_norm, BatchNorm)
            assert isinstance(self.depthwise_norm, BatchNorm)
            weight, stride = self.depthwise.weight, self.depthwise.stride[0]
            return fused_depthwise(x_BHWC, self.expand_norm, weight, self.depthwise_norm, stride=stride, gelu=self.gelu)
        y = F.gelu(self.expand_norm(x_BHWC), approximate=self.gelu)
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = F.gelu(self.depthwise_norm(y), approximate=self.gelu)
        return y, y.mean(dim=(1, 2))
