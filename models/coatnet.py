"""CoAtNet: a convolutional stem, MBConv stages, Transformer stages with relative attention, a classifier.

Activations are channels-last from stem to head, written (B, H, W, C).
"""

from collections.abc import Container, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.activation_checkpointing import recompute_in_backward, recomputed_blocks
from models.attention import RelativeAttention, TransformerBlock
from models.drop import Kept, draw_kept
from models.initialization import initialize_parameters
from models.mbconv import MBConv
from models.model_facts import ModelFacts
from models.norm import BatchNorm, convolution_norm
from models.options import APPROXIMATION, CheckpointingPolicy
from models.relative_bias import RelativeBias
from models.variants import BlockStage, Variant


class Stem(nn.Module):
    """Two 3x3 convolutions, the first strided, with a norm and GELU between them (stage S0)."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        width = variant.stem_width
        self.conv1 = nn.Conv2d(3, width, 3, stride=variant.stem_stride, padding=1)
        self.norm = convolution_norm(width, variant)
        self.gelu = APPROXIMATION[variant.gelu]
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x = self.conv1(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.gelu(self.norm(x), approximate=self.gelu)
        y_BCHW: Tensor = self.conv2(x.permute(0, 3, 1, 2))
        return y_BCHW.permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """One convolution of square patches that do not overlap: ViT's stem (paper, section 2.2)."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, variant.stem_width, variant.stem_stride, stride=variant.stem_stride)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv(x_BHWC.permute(0, 3, 1, 2))
        return y_BCHW.permute(0, 2, 3, 1)


class Head(nn.Module):
    """Global average pool - LayerNorm - Linear(D, D) - tanh - Linear(D, classes).

    The hidden layer is not in the paper's text; the published parameter counts need it, and MaxViT has it. It is the
    identity where the variant has none, as is the classifier for 0 classes.
    """

    def __init__(self, width: int, num_classes: int, variant: Variant) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=variant.layer_norm_epsilon)
        self.hidden = nn.Linear(width, width) if variant.head_hidden_layer else nn.Identity()
        self.classifier = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        x_BD: Tensor = self.norm(x_BHWC.mean(dim=(1, 2)))
        if isinstance(self.hidden, nn.Linear):
            x_BD = torch.tanh(self.hidden(x_BD))
        return x_BD if pre_logits else self.classifier(x_BD)


class CoAtNet(nn.Module):
    """The network of one `Variant`; `models.registry.create_model` makes one by name.

    The interface is timm's, except that images and features are channels-last.

    Args:
        variant: stem, stages and options.
        num_classes: outputs of the classifier; 0 for none.
        image_size: pixels (height, width) for which the relative tables are made; each a multiple of the variant's
            stride. Images of other such sizes work too: the tables are resized bilinearly in the forward.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 over all blocks.

    Raises:
        ValueError: an image size that the strides do not divide, or a rate outside [0, 1).
    """

    facts: ModelFacts | None = None
    """Classes and preprocessing of a trained model, as `models.pretrained.load_pretrained` sets them."""

    def __init__(
        self, variant: Variant, *, num_classes: int, image_size: tuple[int, int], drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        _check_image_size(image_size, variant)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate}: must be at least 0 and less than 1")
        self.variant = variant
        self.num_classes = num_classes
        self.image_size = image_size
        self.stem = Stem(variant) if variant.stem == "convolutions" else PatchStem(variant)
        self.feature_info: list[dict[str, Any]] = []
        """What `forward_intermediates` returns, stem first: `num_chs`, `reduction` (pixels per cell), `module`."""
        self._feature_steps: list[int] = []
        """Position of each of these among stem and blocks."""
        blocks: list[MBConv | TransformerBlock] = []
        width, stride = variant.stem_width, variant.stem_stride
        self._note_feature(0, width, stride)
        for stage in variant.stages:
            stride *= stage.stride
            grid = (image_size[0] // stride, image_size[1] // stride)
            for position in range(stage.depth):
                blocks.append(_block(stage, width, stage.stride if position == 0 else 1, grid, variant))
                width = stage.width
            self._note_feature(len(blocks), width, stride)
        self.blocks = nn.ModuleList(blocks)
        self.num_features = width
        self.head = Head(width, num_classes, variant)
        last = max(1, len(blocks) - 1)
        rates = [drop_path_rate * number / last for number in range(len(blocks))]
        self.drop_rates = [(r,) * block.branches if r > 0.0 else () for r, block in zip(rates, blocks, strict=True)]
        """For each block, the rates at which stochastic depth drops its branches."""
        self.compiled = False
        self.set_grad_checkpointing(False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Logits (B, classes) of normalized images (B, H, W, 3)."""
        return self.forward_head(self.forward_features(x_BHWC))

    def forward_features(self, x_BHWC: Tensor) -> Tensor:
        """The last block's output (B, H/stride, W/stride, D) for normalized images (B, H, W, 3).

        Raises:
            ValueError: images of another shape, or of a size that the strides do not divide.
        """
        return self._run(x_BHWC)[0]

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of features (B, H, W, D), or with `pre_logits` what the classifier sees (B, D)."""
        logits: Tensor = self.head(x_BHWC, pre_logits)
        return logits

    def forward_intermediates(
        self,
        x_BHWC: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        stop_early: bool = False,
        output_fmt: str = "NHWC",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Features after the stem and after each stage, as `feature_info` lists them.

        Args:
            x_BHWC: normalized images (B, H, W, 3).
            indices: positions in `feature_info`, negative ones from the end; or the number of last ones; None for all.
            stop_early: compute no block after the last requested one.
            output_fmt: `NHWC`, or `NCHW` for views of that order.
            intermediates_only: without the final features.

        Returns:
            The final features (B, h, w, D), which `forward_head` takes, and the list of intermediate ones.

        Raises:
            ValueError: an unknown format, a position that does not exist, or what `forward_features` refuses.
        """
        if output_fmt not in ("NHWC", "NCHW"):
            raise ValueError(f"output_fmt {output_fmt}: must be NHWC or NCHW")
        count = len(self.feature_info)
        if indices is None:
            indices = count
        places = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        if not places or any(not -count <= place < count for place in places):
            raise ValueError(f"indices {indices}: this model has features 0 to {count - 1}")
        steps = [self._feature_steps[place] for place in places]
        final, outputs = self._run(x_BHWC, steps, last=max(steps) if stop_early else None)
        features = [outputs[step] for step in steps]
        if output_fmt == "NCHW":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return features if intermediates_only else (final, features)

    def get_classifier(self) -> nn.Module:
        """The last layer: Linear(D, classes), or the identity."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, *, seed: int = 0) -> None:
        """Replace the classifier by a new one, initialized, on the device and in the dtype of the head; 0 for none."""
        place = self.head.norm.weight
        self.num_classes = num_classes
        self.head.classifier = (
            nn.Linear(self.num_features, num_classes, device=place.device, dtype=place.dtype)
            if num_classes
            else nn.Identity()
        )
        if not place.is_meta:
            self.initialize(seed, only={"head.classifier.weight", "head.classifier.bias"})

    def set_grad_checkpointing(self, enable: bool = True, policy: CheckpointingPolicy = "every_block") -> None:
        """Recompute in the backward the blocks that `policy` names, or none.

        Raises:
            ValueError: an unknown policy.
        """
        convolves = [isinstance(self.stem, Stem), *(isinstance(block, MBConv) for block in self.blocks)]
        self.recomputed = recomputed_blocks(policy if enable else "none", convolves)

    def set_fused_depthwise(self, enable: bool = True) -> None:
        """Compute the middle of MBConv in training by `models.fused_depthwise`: on GPUs by kernels that need Triton.

        The result is the same up to rounding. Evaluation, blocks with LayerNorm and the stem compute as without it.

        Raises:
            ValueError: no block is an MBConv with BatchNorm.
        """
        blocks = [block for block in self.blocks if isinstance(block, MBConv)]
        if enable and (not blocks or self.variant.convolution_norm != "batch"):
            raise ValueError(
                "a fused depthwise convolution needs MBConv blocks with BatchNorm, and this model has none"
            )
        for block in blocks:
            block.fused = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: biases, norms and relative tables."""
        names = set()
        for prefix, module in self.named_modules():
            whole = isinstance(module, nn.LayerNorm | BatchNorm | RelativeBias)
            for name, _ in module.named_parameters(prefix, recurse=False):
                if whole or name.endswith(".bias"):
                    names.add(name)
        return names

    def parameters_without_gradient(self) -> dict[str, tuple[int, int]]:
        """Name -> the elements `start` .. `stop` of the flattened parameter whose gradient is zero, whatever the loss.

        What is computed for them is rounding error. BatchNorm in training subtracts what the bias of the stem's first
        convolution adds to a channel. It does the same for the bias of MBConv's first norm, which reaches the second
        one as a constant, through a linear layer. The softmax of attention is the same whatever the bias of the keys
        adds to all scores of a query. (In an attention over a single cell, queries, keys and tables have no gradient
        either; they are not listed.)
        """
        found = {}
        for prefix, module in self.named_modules():
            if isinstance(module, Stem) and isinstance(module.norm, BatchNorm):
                found[f"{prefix}.conv1.bias"] = (0, module.conv1.out_channels)
            elif isinstance(module, MBConv) and isinstance(module.expand_norm, BatchNorm):
                found[f"{prefix}.norm.bias"] = (0, module.expand.in_features)
            elif isinstance(module, RelativeAttention):
                width = module.out.in_features
                found[f"{prefix}.qkv.bias"] = (width, 2 * width)
        return found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers from input to output, for layer-wise learning rates.

        In the form of timm's `group_parameters`: one layer for each block or, if `coarse`, for each stage.
        """
        stages = []
        first = 0
        for number, stage in enumerate(self.variant.stages):
            numbers = "|".join(map(str, range(first, first + stage.depth)))
            stages.append((rf"^blocks\.(?:{numbers})\.", (number,)))
            first += stage.depth
        blocks = stages if coarse else [(r"^blocks\.(\d+)\.", None)]
        return {"stem": r"^stem\.", "blocks": [*blocks, (r"^head\.", (99999,))]}

    def compile_blocks(self, **options: Any) -> None:
        """Compile stem and blocks in place, each as one graph; parameter names do not change.

        Blocks of the same kind and shape share their code. `options` go to `torch.compile`. Raises dynamo's limit of
        compilations per function to 64: the largest variants have 14 kinds of blocks, for training and evaluation.
        """
        self.compiled = True
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for module in (self.stem, *self.blocks):
            module.compile(fullgraph=True, **options)

    def initialize(self, seed: int = 0, only: Container[str] | None = None) -> None:
        """Initial weights by seed and parameter name, on any device; see `initialize_parameters`."""
        initialize_parameters(self, seed, weight_std=self.variant.weight_std, only=only)

    def _note_feature(self, step: int, width: int, stride: int) -> None:
        module = f"blocks.{step - 1}" if step else "stem"
        self.feature_info.append({"num_chs": width, "reduction": stride, "module": module})
        self._feature_steps.append(step)

    def _run(self, x: Tensor, wanted: Container[int] = (), last: int | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """The output of the last module that ran, and the outputs at the `wanted` positions; position 0 is the stem."""
        if x.dim() != 4 or x.shape[-1] != 3:
            raise ValueError(f"images of shape {tuple(x.shape)}: must be (batch, height, width, 3), channels last")
        _check_image_size((x.shape[1], x.shape[2]), self.variant)
        kept = self._draw_kept(x)
        outputs = {}
        for step, module in enumerate([self.stem, *self.blocks]):
            arguments = () if step == 0 else (kept[step - 1],)
            if self.recomputed[step] and torch.is_grad_enabled():
                x = recompute_in_backward(module, x, *arguments)
            else:
                x = module(x, *arguments)
            if step in wanted:
                outputs[step] = x
            if step == last:
                break
        return x, outputs

    def _draw_kept(self, x: Tensor) -> list[tuple[Kept, ...] | None]:
        """What stochastic depth keeps in each block; None where it drops nothing."""
        if not self.training:
            return [None] * len(self.blocks)
        kept = draw_kept([rate for rates in self.drop_rates for rate in rates], x.shape[0], x.device)
        if self.compiled:
            for draw in kept:
                # Otherwise every number of kept samples would be compiled anew.
                torch._dynamo.maybe_mark_dynamic(draw.samples, 0)
        drawn = iter(kept)
        return [tuple(islice(drawn, len(rates))) or None for rates in self.drop_rates]


def _block(
    stage: BlockStage, in_width: int, stride: int, grid: tuple[int, int], variant: Variant
) -> MBConv | TransformerBlock:
    if stage.kind == "mbconv":
        return MBConv(in_width, stage.width, stride=stride, variant=variant)
    return TransformerBlock(in_width, stage.width, stride=stride, grid=grid, variant=variant)


def _check_image_size(image_size: tuple[int, int], variant: Variant) -> None:
    if any(side % variant.stride for side in image_size) or min(image_size) <= 0:
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]}: each side must be a multiple of {variant.stride}"
        )
