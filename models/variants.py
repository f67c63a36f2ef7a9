"""The CoAtNet family as one table: which blocks, how many, how wide.

Source: Dai et al., "CoAtNet: Marrying Convolution and Attention for All Data Sizes", arXiv 2106.04803 v2,
Tables 3 (CoAtNet-0..4), 11 (CoAtNet-5) and 12 (CoAtNet-6 and 7).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class BlockStage:
    """`depth` blocks of one kind and width; the first of them strides and changes the width."""

    kind: Literal["mbconv", "transformer"]
    depth: int
    width: int
    stride: int = 2


@dataclass(frozen=True, slots=True)
class Variant:
    """One member of the family: a convolutional stem and a chain of block stages."""

    stem_width: int
    stages: tuple[BlockStage, ...]
    head_size: int = 32
    """Channels of one attention head."""
    stem_stride: int = 2
    batch_norm_momentum: float = 0.01
    """Share of the new statistics per step, in torch's sense."""
    weight_std: float | None = 0.02
    """Standard deviation of initial weights; None for 1 / sqrt(fan-in)."""

    @property
    def stride(self) -> int:
        """Input pixels along one side of a cell of the last stage."""
        stride = self.stem_stride
        for stage in self.stages:
            stride *= stage.stride
        return stride


def _conv(depth: int, width: int) -> BlockStage:
    return BlockStage("mbconv", depth, width)


def _attention(depth: int, width: int, stride: int = 2) -> BlockStage:
    return BlockStage("transformer", depth, width, stride)


def _coatnet(stem_width: int, *stages: BlockStage, head_size: int = 32) -> Variant:
    return Variant(stem_width, stages, head_size)


# S0, then S1, S2, S3 and S4; CoAtNet-6 and 7 split S3 into MBConv blocks and, at the same stride, Transformer blocks.
# CoAtNet-6's S4 is 3072 wide: Table 12 prints 2048, with which the 1.47B parameters of Table 5 cannot be reached.
VARIANTS: dict[str, Variant] = {
    "coatnet_0": _coatnet(64, _conv(2, 96), _conv(3, 192), _attention(5, 384), _attention(2, 768)),
    "coatnet_1": _coatnet(64, _conv(2, 96), _conv(6, 192), _attention(14, 384), _attention(2, 768)),
    "coatnet_2": _coatnet(128, _conv(2, 128), _conv(6, 256), _attention(14, 512), _attention(2, 1024)),
    "coatnet_3": _coatnet(192, _conv(2, 192), _conv(6, 384), _attention(14, 768), _attention(2, 1536)),
    "coatnet_4": _coatnet(192, _conv(2, 192), _conv(12, 384), _attention(28, 768), _attention(2, 1536)),
    "coatnet_5": _coatnet(192, _conv(2, 256), _conv(12, 512), _attention(28, 1280), _attention(2, 2048), head_size=64),
    "coatnet_6": _coatnet(
        192,
        _conv(2, 192), _conv(4, 384), _conv(8, 768), _attention(42, 1536, stride=1), _attention(2, 3072),
        head_size=128,
    ),
    "coatnet_7": _coatnet(
        192,
        _conv(2, 256), _conv(4, 512), _conv(8, 1024), _attention(42, 2048, stride=1), _attention(2, 3072),
        head_size=128,
    ),
    # Ours, for two CPU cores and small pictures. At these widths weights of 0.02 would let the signal fade, and runs of
    # hundreds of steps need statistics that follow faster.
    "coatnet_nano": Variant(
        32,
        (_conv(2, 32), _conv(2, 64), _attention(1, 96), _attention(1, 128, stride=1)),
        batch_norm_momentum=0.1, weight_std=None,
    ),
    "coatnet_debug": Variant(
        8,
        (_conv(1, 8), _conv(1, 16), _attention(1, 32), _attention(1, 32, stride=1)),
        head_size=16, batch_norm_momentum=0.1, weight_std=None,
    ),
}  # fmt: skip
