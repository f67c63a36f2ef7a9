"""The MBConv block: inverted bottleneck with a depthwise convolution and squeeze-and-excitation, pre-activation."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import max_pool
from models.drop import drop_samples
from models.norm import BatchNorm

EXPANSION = 4
SQUEEZE = 0.25


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the picture's channel means (Hu et al., arXiv 1709.01507)."""

    def __init__(self, width: int, squeezed_width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, squeezed_width)
        self.excite = nn.Linear(squeezed_width, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        gate_BC: Tensor = self.excite(F.silu(self.squeeze(x_BHWC.mean(dim=(1, 2)))))
        return x_BHWC * gate_BC.sigmoid()[:, None, None, :]


class MBConv(nn.Module):
    """`Proj(Pool(x)) + Shrink(SE(DepthConv(Expand(Norm(x), stride))))` (paper, equation 5).

    The stride sits in the 1x1 expansion, which therefore reads a quarter of the pixels. Expansion and squeeze are
    relative to the OUTPUT width: only so the published sizes and multiply-adds are met.

    Args:
        in_width, width: channels in and out.
        stride: 1 or 2.
        drop_rate: probability that a sample skips the branch in training.
        momentum: of the BatchNorm statistics, torch's sense.
    """

    def __init__(self, in_width: int, width: int, *, stride: int, drop_rate: float, momentum: float) -> None:
        super().__init__()
        hidden = EXPANSION * width
        self.stride = stride
        self.drop_rate = drop_rate
        self.shortcut = nn.Linear(in_width, width) if in_width != width else nn.Identity()
        self.norm = BatchNorm(in_width, momentum=momentum)
        self.expand = nn.Linear(in_width, hidden, bias=False)
        self.expand_norm = BatchNorm(hidden, momentum=momentum)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = BatchNorm(hidden, momentum=momentum)
        self.squeeze_excitation = SqueezeExcitation(hidden, int(SQUEEZE * width))
        self.shrink = nn.Linear(hidden, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        shortcut: Tensor = self.shortcut(max_pool(x_BHWC) if self.stride == 2 else x_BHWC)
        y: Tensor = self.norm(x_BHWC)[:, :: self.stride, :: self.stride]
        y = F.gelu(self.expand_norm(self.expand(y)), approximate="tanh")
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = F.gelu(self.depthwise_norm(y), approximate="tanh")
        y = self.shrink(self.squeeze_excitation(y))
        if self.training and self.drop_rate > 0.0:
            y = drop_samples(y, self.drop_rate)
        return shortcut + y
