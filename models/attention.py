"""The Transformer block with relative attention.

Shapes: B batch, H W grid of cells, N = H*W tokens, C channels, A attention heads, D channels of a head.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.drop import add_branch_of_kept_samples
from models.relative_bias import RelativeBias

# Flash attention takes no bias. cuDNN's takes none that needs a gradient and has returned wrong numbers with masks,
# so it is left out of evaluation as well: training and evaluation run the same kernel.
ATTENTION_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def max_pool(x_BHWC: Tensor) -> Tensor:
    """2x2 max pooling of stride 2, (B, H, W, C) -> (B, H/2, W/2, C)."""
    return F.max_pool2d(x_BHWC.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class RelativeAttention(nn.Module):
    """softmax(q k / sqrt(D) + w[i-j]) v: relative attention, pre-normalization (paper, equation 3)."""

    def __init__(self, in_width: int, width: int, head_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.head_size = head_size
        self.heads = width // head_size
        self.qkv = nn.Linear(in_width, 3 * width)
        self.relative_bias = RelativeBias(self.heads, grid)
        self.out = nn.Linear(width, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, _ = x_BHWC.shape
        qkv_BN3AD = self.qkv(x_BHWC).reshape(B, H * W, 3, self.heads, self.head_size)
        q_BAND, k_BAND, v_BAND = qkv_BN3AD.permute(2, 0, 3, 1, 4).unbind(0)
        bias_ANN = self.relative_bias().to(q_BAND.dtype)
        with sdpa_kernel(ATTENTION_BACKENDS):
            y_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, attn_mask=bias_ANN.expand(B, -1, -1, -1))
        y_BHWC: Tensor = self.out(y_BAND.transpose(1, 2).reshape(B, H, W, -1))
        return y_BHWC


class FeedForward(nn.Module):
    """Linear - GELU - Linear with a hidden width of four times the output's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC: Tensor = self.shrink(F.gelu(self.expand(x_BHWC), approximate="tanh"))
        return y_BHWC


class TransformerBlock(nn.Module):
    """Relative attention and feed-forward, each pre-normalized and residual (paper, appendix A.1).

    The first block of a stage pools the normalized input and the shortcut by 2x2 maxima (stride 2) and changes the
    width in q, k, v and in a projected shortcut.

    Args:
        in_width, width: channels in and out.
        head_size: channels of one head; divides `width`.
        grid: cells (H, W) after pooling.
        stride: 1 or 2.
        drop_rate: probability that a sample skips a branch in training, drawn separately for the two branches.
    """

    def __init__(
        self, in_width: int, width: int, *, head_size: int, grid: tuple[int, int], stride: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.stride = stride
        self.drop_rate = drop_rate
        self.attention_norm = nn.LayerNorm(in_width, eps=1e-5)
        self.attention = RelativeAttention(in_width, width, head_size, grid)
        self.shortcut = nn.Linear(in_width, width) if in_width != width else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width)

    def _pool(self, x_BHWC: Tensor) -> Tensor:
        return max_pool(x_BHWC) if self.stride == 2 else x_BHWC

    def _attention_branch(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC: Tensor = self.attention(self._pool(self.attention_norm(x_BHWC)))
        return y_BHWC

    def _feed_forward_branch(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC: Tensor = self.feed_forward(self.feed_forward_norm(x_BHWC))
        return y_BHWC

    def forward(self, x_BHWC: Tensor) -> Tensor:
        shortcut: Tensor = self.shortcut(self._pool(x_BHWC))
        if not (self.training and self.drop_rate > 0.0):
            y_BHWC = shortcut + self._attention_branch(x_BHWC)
            return y_BHWC + self._feed_forward_branch(y_BHWC)
        y_BHWC = add_branch_of_kept_samples(shortcut, x_BHWC, self._attention_branch, self.drop_rate)
        return add_branch_of_kept_samples(y_BHWC, y_BHWC, self._feed_forward_branch, self.drop_rate)
