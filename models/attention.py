"""The Transformer block with relative attention.

Shapes: B batch, H W grid of cells, N = H*W tokens, C channels, A attention heads, D channels of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.drop import Kept
from models.exporting import exporting
from models.options import APPROXIMATION
from models.pool import pool_by_two
from models.relative_bias import RelativeBias
from models.variants import Variant

# A bias that needs a gradient leaves the memory-efficient kernel on GPUs: flash attention takes no bias there, and
# cuDNN's takes none that needs a gradient. cuDNN's has returned wrong numbers with masks (pytorch PR 191612, issue
# 196678), so it is not used in evaluation either. On CPUs flash attention takes a bias without a gradient; it
# is four times as fast in evaluation as MATH, which trains there, and stores no attention matrix.
ATTENTION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RelativeAttention(nn.Module):
    """Multi-head attention with a learned bias w[i-j] of the displacement between query and key.

    Pre-normalization: `softmax(q k / sqrt(D) + w) v` (paper, equation 3). Post-normalization:
    `(softmax(q k / sqrt(D)) + w) v`, the form that the paper discusses and rejects. None: no bias.
    """

    def __init__(self, in_width: int, width: int, *, grid: tuple[int, int], variant: Variant) -> None:
        super().__init__()
        self.head_size = variant.head_size
        self.heads = width // variant.head_size
        self.form = variant.relative_attention
        self.qkv = nn.Linear(in_width, 3 * width)
        if self.form != "none":
            self.relative_bias = RelativeBias(self.heads, grid)
        self.out = nn.Linear(width, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, _ = x_BHWC.shape
        qkv_BN3AD = self.qkv(x_BHWC).reshape(B, H * W, 3, self.heads, self.head_size)
        q_BAND, k_BAND, v_BAND = qkv_BN3AD.permute(2, 0, 3, 1, 4).unbind(0)
        # One copy for the batch: the kernel pads a mask to eight columns, and would pad one for every sample.
        bias_1ANN = None if self.form == "none" else self.relative_bias((H, W), q_BAND.dtype)[None]
        mask = bias_1ANN if self.form == "pre_normalization" else None
        with sdpa_kernel(ATTENTION_BACKENDS):
            y_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, attn_mask=mask)
        if self.form == "post_normalization":
            y_BAND = y_BAND + bias_1ANN @ v_BAND
        y_BNAD = y_BAND.transpose(1, 2)
        if exporting():
            # Export records `reshape` as the view that it is after this device's kernel. Where attention is decomposed,
            # as for ONNX, the strides are others, and no view of them has this shape.
            y_BNAD = y_BNAD.clone(memory_format=torch.contiguous_format)
        y_BHWC: Tensor = self.out(y_BNAD.reshape(B, H, W, -1))
        return y_BHWC


class FeedForward(nn.Module):
    """Linear - GELU - Linear with a hidden width of four times the output's."""

    def __init__(self, width: int, variant: Variant) -> None:
        super().__init__()
        self.gelu = APPROXIMATION[variant.gelu]
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC: Tensor = self.shrink(F.gelu(self.expand(x_BHWC), approximate=self.gelu))
        return y_BHWC


class TransformerBlock(nn.Module):
    """Relative attention and feed-forward, each pre-normalized and residual (paper, appendix A.1).

    The first block of a stage pools the normalized input and the shortcut 2x2 (stride 2) and changes the width in
    q, k, v and in a projected shortcut.

    Args:
        in_width, width: channels in and out.
        stride: 1 or 2.
        grid: cells (H, W) after pooling, for which the relative bias is made.
        variant: has the options.
    """

    branches = 2
    """Residual branches that stochastic depth can drop: attention and feed-forward."""

    def __init__(self, in_width: int, width: int, *, stride: int, grid: tuple[int, int], variant: Variant) -> None:
        super().__init__()
        self.stride = stride
        self.pool = variant.pool
        self.attention_norm = nn.LayerNorm(in_width, eps=variant.layer_norm_epsilon)
        self.attention = RelativeAttention(in_width, width, grid=grid, variant=variant)
        self.shortcut = nn.Linear(in_width, width) if in_width != width else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(width, eps=variant.layer_norm_epsilon)
        self.feed_forward = FeedForward(width, variant)

    def _pool(self, x_BHWC: Tensor) -> Tensor:
        return pool_by_two(x_BHWC, self.pool) if self.stride == 2 else x_BHWC

    def _attend(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC: Tensor = self.attention(self._pool(self.attention_norm(x_BHWC)))
        return y_BHWC

    def _feed_forward(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC: Tensor = self.feed_forward(self.feed_forward_norm(x_BHWC))
        return y_BHWC

    def forward(self, x_BHWC: Tensor, kept: tuple[Kept, ...] | None = None) -> Tensor:
        """(B, H, W, in_width) -> (B, H/stride, W/stride, width); samples that are not in `kept` are not computed."""
        shortcut: Tensor = self.shortcut(self._pool(x_BHWC))
        if kept is None:
            y_BHWC = shortcut + self._attend(x_BHWC)
            return y_BHWC + self._feed_forward(y_BHWC)
        attention, feed_forward = kept
        y_BHWC = attention.add(shortcut, self._attend(attention.of(x_BHWC)))
        return feed_forward.add(y_BHWC, self._feed_forward(feed_forward.of(y_BHWC)))
