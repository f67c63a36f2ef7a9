"""What a model costs, counted from the model itself: parameters, multiply-adds, activations stored for the backward.

Counting runs the model on the meta device, where operations have shapes and no values, so it takes no memory and
little time. Multiply-adds are those of convolutions, matrix products and attention; norms, softmax and look-ups are
not counted, which leaves the counts up to 4 % below the paper's FLOPs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.activation_checkpointing import recomputed_blocks
from models.coatnet import CoAtNet
from models.options import CheckpointingPolicy
from models.variants import Variant


@dataclass(frozen=True, slots=True)
class Published:
    """Figures that the paper prints, as it prints them (Tables 3, 5, 9, 11, 12)."""

    parameters: str | None
    multiply_adds: dict[int, float]
    """By side length of the image, in billions; the paper calls them FLOPs."""


PUBLISHED: dict[str, Published] = {
    "coatnet_0": Published("25M", {224: 4.2, 384: 13.4}),
    "coatnet_1": Published("42M", {224: 8.4, 384: 27.4}),
    "coatnet_2": Published("75M", {224: 15.7, 384: 49.8, 512: 96.7}),
    "coatnet_3": Published("168M", {224: 34.7, 384: 107.4, 512: 203.1}),
    "coatnet_4": Published("275M", {384: 189.5, 512: 360.9}),
    "coatnet_5": Published("688M", {512: 812.0}),
    "coatnet_6": Published("1.47B", {512: 1521.0}),
    "coatnet_7": Published("2.44B", {512: 2586.0}),
    "coatnet_0_dw": Published(None, {224: 4.6}),
    "coatnet_1_dw": Published(None, {224: 8.8}),
    "coatnet_2_dw": Published(None, {224: 16.6}),
    "coatnet_3_dw": Published("168M", {384: 114.0, 512: 214.0}),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of the model costs for one image."""

    multiply_adds: int
    """Of one forward."""
    activation_bytes: int
    """Stored for the backward by one more image in the micro-batch, in bf16 with memory-efficient attention.

    What does not grow with the micro-batch (weights, relative tables) does not count. With activation checkpointing a
    recomputed block stores its input instead.
    """


def count_parameters(variant: Variant, image_size: int = 224, num_classes: int = 1000) -> int:
    """Parameters of a model with relative tables for square images of `image_size` pixels."""
    return sum(p.numel() for p in _on_meta(variant, (image_size, image_size), num_classes).parameters())


def count_parameters_without_dense_head(variant: Variant, image_size: int = 224, num_classes: int = 1000) -> int:
    """`count_parameters` of the variant whose head has no hidden layer."""
    return count_parameters(replace(variant, head_hidden_layer=False), image_size, num_classes)


def count_costs(variant: Variant, image_size: int, num_classes: int = 1000) -> list[Cost]:
    """The costs of stem, blocks and head for square images of `image_size` pixels."""
    side, width = image_size // variant.stem_stride, variant.stem_width
    blocks = []
    for stage in variant.stages:
        for position in range(stage.depth):
            stride = stage.stride if position == 0 else 1
            alone = replace(variant, stem_width=width, stages=(replace(stage, depth=1, stride=stride),))
            blocks.append(_count_cost("block", alone, side, num_classes))
            side, width = side // stride, stage.width
    stem = _count_cost("stem", replace(variant, stages=variant.stages[:1]), image_size, num_classes)
    head = _count_cost("head", replace(variant, stages=(replace(variant.stages[-1], depth=1),)), side, num_classes)
    return [stem, *blocks, head]


def count_training_cost(
    variant: Variant, image_size: int, num_classes: int = 1000, policy: CheckpointingPolicy = "none"
) -> Cost:
    """What one image costs in training, with activation checkpointing by `policy`.

    Its multiply-adds are those of the forward, of a backward that costs two forwards, and of the recomputation. Stored
    are the inputs of recomputed blocks, and the activations of the largest of them, which exist during its backward.
    """
    costs = count_costs(variant, image_size, num_classes)
    convolves, input_bytes = [variant.stem == "convolutions"], [3 * image_size**2 * 2]
    side, width = image_size // variant.stem_stride, variant.stem_width
    for stage in variant.stages:
        for position in range(stage.depth):
            convolves.append(stage.kind == "mbconv")
            input_bytes.append(width * side**2 * 2)
            side, width = side // (stage.stride if position == 0 else 1), stage.width
    again = recomputed_blocks(policy, convolves)
    recomputed = [cost for cost, is_again in zip(costs[:-1], again, strict=True) if is_again]
    kept = [
        size if is_again else cost.activation_bytes
        for cost, is_again, size in zip(costs[:-1], again, input_bytes, strict=True)
    ]
    return Cost(
        3 * sum(cost.multiply_adds for cost in costs) + sum(cost.multiply_adds for cost in recomputed),
        sum(kept) + costs[-1].activation_bytes + max((cost.activation_bytes for cost in recomputed), default=0),
    )


@cache
def _count_cost(part: Literal["stem", "block", "head"], variant: Variant, side: int, num_classes: int) -> Cost:
    """The cost of one part of a small `variant` for an input of `side` cells a side.

    Cached, since the blocks of a stage are alike and variants share many.
    """
    size = side * variant.stem_stride if part == "block" else variant.stride
    model = _on_meta(variant, (size, size), num_classes).train()
    module, width = {
        "stem": (model.stem, 3),
        "block": (model.blocks[0], variant.stem_width),
        "head": (model.head, model.num_features),
    }[part]
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    one, two = (torch.empty(n, side, side, width, dtype=torch.bfloat16, device="meta") for n in (1, 2))
    with FlopCounterMode(display=False) as counter:
        of_one = _saved_bytes(module, one.requires_grad_(part != "stem"))
    of_two = _saved_bytes(module, two.requires_grad_(part != "stem"))
    return Cost(int(counter.get_total_flops()) // 2, of_two - of_one)


def _on_meta(variant: Variant, image_size: tuple[int, int], num_classes: int) -> CoAtNet:
    with torch.device("meta"):
        return CoAtNet(variant, num_classes=num_classes, image_size=image_size)


class _MemoryEfficientAttention(TorchFunctionMode):
    """Runs attention as the kernel that trains on GPUs; the meta device would take the plain formula."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **keywords)
        q, k, v = arguments
        mask = keywords["attn_mask"]
        if mask is not None:
            mask = mask.expand(q.shape[0], -1, -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, compute_log_sumexp=True)[0]


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a forward of `module` stores for its backward, except parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no two storages have one address

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), _MemoryEfficientAttention():
        module(x)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in parameters)
