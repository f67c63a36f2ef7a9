"""CoAtNet: a convolutional stem, MBConv stages, Transformer stages with relative attention, a classifier.

Activations are channels-last from stem to head, written (B, H, W, C).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import TransformerBlock
from models.mbconv import MBConv
from models.norm import BatchNorm
from models.relative_bias import RelativeBias, resize_relative_bias
from models.variants import Variant


class Stem(nn.Module):
    """Two 3x3 convolutions, the first strided, with BatchNorm and GELU between them (stage S0)."""

    def __init__(self, width: int, *, stride: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=stride, padding=1)
        self.norm = BatchNorm(width, momentum=momentum)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x = self.conv1(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.gelu(self.norm(x), approximate="tanh")
        y_BCHW: Tensor = self.conv2(x.permute(0, 3, 1, 2))
        return y_BCHW.permute(0, 2, 3, 1)


class Head(nn.Module):
    """Global average pool - LayerNorm - Linear(D, D) - tanh - Linear(D, classes).

    The hidden layer is not in the paper's text; the published parameter counts need it, and MaxViT has it.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.hidden = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BD = self.norm(x_BHWC.mean(dim=(1, 2)))
        logits: Tensor = self.classifier(torch.tanh(self.hidden(x_BD)))
        return logits


class CoAtNet(nn.Module):
    """The network of one `Variant` for pictures of one size.

    Args:
        variant: stem, stages and head size.
        num_classes: outputs of the classifier.
        image_size: pixels (height, width); each a multiple of the variant's stride.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 over all blocks.

    Raises:
        ValueError: an image size that the strides do not divide, or a rate outside [0, 1).
    """

    def __init__(
        self, variant: Variant, *, num_classes: int, image_size: tuple[int, int], drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        if any(side % variant.stride for side in image_size) or min(image_size) <= 0:
            raise ValueError(
                f"image size {image_size[0]} x {image_size[1]}: each side must be a multiple of {variant.stride}"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate}: must be at least 0 and less than 1")
        self.variant = variant
        self.num_classes = num_classes
        self.image_size = image_size
        self.stem = Stem(variant.stem_width, stride=variant.stem_stride, momentum=variant.batch_norm_momentum)
        depth = sum(stage.depth for stage in variant.stages)
        width, stride, blocks = variant.stem_width, variant.stem_stride, list[nn.Module]()
        for stage in variant.stages:
            stride *= stage.stride
            grid = (image_size[0] // stride, image_size[1] // stride)
            for position in range(stage.depth):
                block_stride = stage.stride if position == 0 else 1
                drop_rate = drop_path_rate * len(blocks) / max(1, depth - 1)
                if stage.kind == "mbconv":
                    block: nn.Module = MBConv(
                        width, stage.width, stride=block_stride, drop_rate=drop_rate,
                        momentum=variant.batch_norm_momentum,
                    )  # fmt: skip
                else:
                    block = TransformerBlock(
                        width, stage.width, head_size=variant.head_size, grid=grid, stride=block_stride,
                        drop_rate=drop_rate,
                    )  # fmt: skip
                blocks.append(block)
                width = stage.width
        self.blocks = nn.ModuleList(blocks)
        self.head = Head(width, num_classes)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Logits (B, classes) of normalized pictures (B, H, W, 3)."""
        x = self.stem(x_BHWC)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Weights N(0, variant's std), relative tables N(0, 0.02), biases 0, norms the identity: as MaxViT does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = self.variant.weight_std or module.weight[0].numel() ** -0.5
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RelativeBias):
                module.table.normal_(0.0, 0.02, generator=generator)
            elif isinstance(module, nn.LayerNorm | BatchNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: biases, norms and relative tables."""
        names = set()
        for prefix, module in self.named_modules():
            whole = isinstance(module, nn.LayerNorm | BatchNorm | RelativeBias)
            for name, _ in module.named_parameters(prefix, recurse=False):
                if whole or name.endswith(".bias"):
                    names.add(name)
        return names


def adapt_parameters(parameters: dict[str, Tensor], model: CoAtNet) -> dict[str, Tensor]:
    """Trained parameters made to fit `model`: relative tables resized, another classifier dropped.

    Returns a dictionary of the model's names; a classifier trained for another number of classes is left out of it,
    so that it keeps its initialization.

    Raises:
        ValueError: the parameters are another architecture's; names the first that differ.
    """
    wanted = dict(model.named_parameters())
    missing, unknown = sorted(wanted.keys() - parameters.keys()), sorted(parameters.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"lacks {missing[0]} and {len(missing) - 1} more"] if missing else []
        parts += [f"has {unknown[0]} and {len(unknown) - 1} more that this model does not"] if unknown else []
        raise ValueError("the parameters are another model's: the checkpoint " + ", and ".join(parts))
    grids = {f"{name}.table": m.grid for name, m in model.named_modules() if isinstance(m, RelativeBias)}
    fitted = {}
    for name, tensor in parameters.items():
        if name in grids and tensor.shape[0] == wanted[name].shape[0]:
            tensor = resize_relative_bias(tensor, grids[name])
        if tensor.shape != wanted[name].shape:
            if name.startswith("head.classifier."):
                continue
            raise ValueError(
                f"the parameters are another model's: {name} is {tuple(tensor.shape)} in the checkpoint "
                f"and {tuple(wanted[name].shape)} in this model"
            )
        fitted[name] = tensor
    return fitted
