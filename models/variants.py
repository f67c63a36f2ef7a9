"""The CoAtNet family as one table: kinds, numbers and widths of blocks, and the options that the paper compares.

Source: Dai et al., "CoAtNet: Marrying Convolution and Attention for All Data Sizes", arXiv 2106.04803 v2.
"""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models.options import BiasPlace, ConvolutionNorm, Gelu, Pooling, StridePlace


@dataclass(frozen=True, slots=True)
class BlockStage:
    """`depth` blocks of one kind and width; the first of them strides and changes the width."""

    kind: Literal["mbconv", "transformer"]
    depth: int
    width: int
    stride: int = 2


@dataclass(frozen=True, slots=True)
class Variant:
    """One member of the family: a stem, a chain of block stages, and the options of its blocks.

    Raises:
        ValueError: an unknown value of an option, or a head size that does not divide a Transformer's width.
    """

    stem_width: int
    stages: tuple[BlockStage, ...]
    head_size: int = 32
    """Channels of one attention head."""
    relative_attention: BiasPlace = "pre_normalization"
    """Where the relative bias is added: before the softmax (the paper's choice), after it, or nowhere (section 2.1)."""
    convolution_norm: ConvolutionNorm = "batch"
    """Norm of the stem and of MBConv: BatchNorm, or LayerNorm over channels (appendix A.1)."""
    pool: Pooling = "max"
    """The 2x2 pooling where a stage strides: of MBConv's shortcut and of both branches of the Transformer."""
    stride_in: StridePlace = "expansion"
    """Where MBConv strides: in its first 1x1 convolution (equation 5) or in the depthwise one (Table 9)."""
    head_hidden_layer: bool = True
    """Linear(D, D) - tanh before the classifier, which the published parameter counts need."""
    stem: Literal["convolutions", "patches"] = "convolutions"
    """Two 3x3 convolutions of stride 2 together, or one 16x16 convolution of stride 16 as in ViT."""
    gelu: Gelu = "tanh"
    """The form of the activation in stem, MBConv and feed-forward."""
    batch_norm_epsilon: float = 1e-3
    """What BatchNorm adds to a variance; MaxViT's value, and timm has 1e-5."""
    layer_norm_epsilon: float = 1e-5
    """What LayerNorm adds to a variance; MaxViT's value, and timm has 1e-6."""
    batch_norm_momentum: float = 0.01
    """Share of the new statistics per step, in torch's sense."""
    weight_std: float | None = 0.02
    """Standard deviation of initial weights; None for 1 / sqrt(fan-in)."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Variant).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} {getattr(self, name)!r}: must be {' or '.join(get_args(kind))}")
        numbers = (self.head_size, self.stem_width, *(n for stage in self.stages for n in (stage.depth, stage.width)))
        if not self.stages or min(numbers) <= 0:
            raise ValueError(f"head_size, depths and widths must be positive: {self.head_size}, {self.stages}")
        if min(self.batch_norm_epsilon, self.layer_norm_epsilon) <= 0:
            raise ValueError("batch_norm_epsilon and layer_norm_epsilon must be positive")
        for stage in self.stages:
            if stage.kind == "transformer" and stage.width % self.head_size:
                raise ValueError(
                    f"head_size {self.head_size} does not divide the width {stage.width} of a Transformer stage; "
                    f"sizes that do: {', '.join(map(str, _divisors(self)))}"
                )

    @property
    def stem_stride(self) -> int:
        """Input pixels along one side of a cell after the stem."""
        return 2 if self.stem == "convolutions" else 16

    @property
    def stride(self) -> int:
        """Input pixels along one side of a cell of the last stage."""
        stride = self.stem_stride
        for stage in self.stages:
            stride *= stage.stride
        return stride

    def altered(
        self, depths: tuple[int, ...] | None = None, widths: tuple[int, ...] | None = None, **options: Any
    ) -> "Variant":
        """This variant with other blocks per stage (`depths`), widths (the stem's, then the stages'), or options.

        Raises:
            ValueError: a wrong number of depths or widths, or an error of the class.
        """
        depths = tuple(stage.depth for stage in self.stages) if depths is None else depths
        widths = (self.stem_width, *(stage.width for stage in self.stages)) if widths is None else widths
        if len(depths) != len(self.stages) or len(widths) != len(self.stages) + 1:
            raise ValueError(
                f"depths {list(depths)} and widths {list(widths)}: this variant has {len(self.stages)} stages, so it "
                f"takes {len(self.stages)} depths and, with the stem's, {len(self.stages) + 1} widths"
            )
        stages = (
            replace(stage, depth=depth, width=width)
            for stage, depth, width in zip(self.stages, depths, widths[1:], strict=True)
        )
        return replace(self, stem_width=widths[0], stages=tuple(stages), **options)


def _divisors(variant: Variant) -> list[int]:
    widths = [stage.width for stage in variant.stages if stage.kind == "transformer"]
    return [size for size in range(8, 257) if all(width % size == 0 for width in widths)]


def _conv(depth: int, width: int) -> BlockStage:
    return BlockStage("mbconv", depth, width)


def _attention(depth: int, width: int, stride: int = 2) -> BlockStage:
    return BlockStage("transformer", depth, width, stride)


# S1, S2, S3, S4 after the stem S0. CoAtNet-6 and 7 split S3 into MBConv blocks and, at its stride, Transformer ones.
_PUBLISHED: dict[str, Variant] = {
    # Table 3
    "coatnet_0": Variant(64, (_conv(2, 96), _conv(3, 192), _attention(5, 384), _attention(2, 768))),
    "coatnet_1": Variant(64, (_conv(2, 96), _conv(6, 192), _attention(14, 384), _attention(2, 768))),
    "coatnet_2": Variant(128, (_conv(2, 128), _conv(6, 256), _attention(14, 512), _attention(2, 1024))),
    "coatnet_3": Variant(192, (_conv(2, 192), _conv(6, 384), _attention(14, 768), _attention(2, 1536))),
    "coatnet_4": Variant(192, (_conv(2, 192), _conv(12, 384), _attention(28, 768), _attention(2, 1536))),
    # Table 11
    "coatnet_5": Variant(192, (_conv(2, 256), _conv(12, 512), _attention(28, 1280), _attention(2, 2048)), 64),
    # Table 12, but for the last width of CoAtNet-6: printed as 2048, with which Table 5's 1.47B cannot be reached.
    "coatnet_6": Variant(
        192, (_conv(2, 192), _conv(4, 384), _conv(8, 768), _attention(42, 1536, stride=1), _attention(2, 3072)), 128
    ),
    "coatnet_6_table12": Variant(
        192, (_conv(2, 192), _conv(4, 384), _conv(8, 768), _attention(42, 1536, stride=1), _attention(2, 2048)), 128
    ),
    "coatnet_7": Variant(
        192, (_conv(2, 256), _conv(4, 512), _conv(8, 1024), _attention(42, 2048, stride=1), _attention(2, 3072)), 128
    ),
}

# The study of layouts (section 2.2, Figure 1) at the cost of CoAtNet-2. The paper does not print their sizes; these
# depths come nearest to CoAtNet-2's 15.5 billion multiply-adds at 224 pixels.
_STUDY: dict[str, Variant] = {
    "coatnet_2_cccc": Variant(128, (_conv(2, 128), _conv(6, 256), _conv(22, 512), _conv(3, 1024))),
    "coatnet_2_ccct": Variant(128, (_conv(2, 128), _conv(6, 256), _conv(22, 512), _attention(2, 1024))),
    "coatnet_2_cctt": _PUBLISHED["coatnet_2"],
    "coatnet_2_cttt": Variant(128, (_conv(2, 128), _attention(3, 256), _attention(14, 512), _attention(2, 1024))),
    "coatnet_2_vit_rel": Variant(768, (_attention(11, 768, stride=1),), stem="patches"),
}

# Ours, for two CPU cores and small images. At these widths weights of 0.02 would let the signal fade, and runs of
# hundreds of steps need running statistics that move faster.
_SMALL: dict[str, Variant] = {
    "coatnet_nano": Variant(
        32, (_conv(2, 32), _conv(2, 64), _attention(1, 96), _attention(1, 128, stride=1)),
        batch_norm_momentum=0.1, weight_std=None,
    ),
    # Halves the resolution in every stage, as the published ones do.
    "coatnet_micro": Variant(
        32, (_conv(2, 32), _conv(2, 64), _attention(1, 96), _attention(1, 128)),
        batch_norm_momentum=0.1, weight_std=None,
    ),
    "coatnet_debug": Variant(
        8, (_conv(1, 8), _conv(1, 16), _attention(1, 32), _attention(1, 32, stride=1)), 16,
        batch_norm_momentum=0.1, weight_std=None,
    ),
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    **_PUBLISHED,
    # Table 9; Table 5's CoAtNet-3 on JFT is coatnet_3_dw.
    **{f"{name}_dw": replace(variant, stride_in="depthwise") for name, variant in _PUBLISHED.items()},
    **_STUDY,
    **_SMALL,
}
"""Every variant by name."""


def find_variant(name: str, **options: Any) -> Variant:
    """The variant `name` of `VARIANTS` with `options` in place of its own.

    Options are fields of `Variant` such as `head_size` or `relative_attention`, and `depths` (blocks of each stage)
    and `widths` (of the stem and of each stage).

    Raises:
        ValueError: an unknown name or option (the nearest known ones are listed), or what `Variant` refuses.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name}; {_nearest(name, list(VARIANTS))}")
    variant = VARIANTS[name]
    known = {field.name for field in fields(Variant)} - {"stages", "stem_width", "stem"}
    unknown = [option for option in options if option not in known | {"depths", "widths"}]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]} of {name}; {_nearest(unknown[0], [*known, 'depths', 'widths'])}")
    return variant.altered(**options)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
