"""timm's CoAtNets and ours: which of our variants timm can express, by what arguments, and its names for our tensors.

Read from timm 1.0.31, `timm/models/maxxvit.py`. timm's registered `coatnet_N_224` differ from the paper's:
average pooling, the stride in the depthwise convolution, exact GELU, other epsilons. `timm_arguments` makes them equal.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.variants import Variant

_NAMES = {
    "stem.norm.": "stem.norm1.",
    "head.hidden.": "head.pre_logits.fc.",
    "head.classifier.": "head.fc.",
}
_NAMES_IN_BLOCKS = {
    "shortcut.": "shortcut.expand.",
    "attention_norm.": "norm1.norm.",
    "attention.qkv.": "attn.qkv.",
    "attention.relative_bias.table": "attn.rel_pos.relative_position_bias_table",
    "attention.out.": "attn.proj.",
    "feed_forward_norm.": "norm2.",
    "feed_forward.expand.": "mlp.fc1.",
    "feed_forward.shrink.": "mlp.fc2.",
    "expand_norm.": "norm1.",
    "depthwise_norm.": "norm2.",
    "expand.": "conv1_1x1.",
    "depthwise.": "conv2_kxk.",
    "squeeze_excitation.squeeze.": "se.fc1.",
    "squeeze_excitation.excite.": "se.fc2.",
    "shrink.": "conv3_1x1.",
    "norm.": "pre_norm.",
}
_COUNTER = "num_batches_tracked"


def why_not_timm(variant: Variant) -> str | None:
    """Why timm cannot express `variant`; None if it can."""
    if variant.stem != "convolutions":
        return "its stem is one convolution of patches, and timm's is two 3x3 convolutions"
    for number, stage in enumerate(variant.stages, 1):
        if stage.stride != 2:
            return f"its stage S{number} does not stride, and every stage of timm's halves the resolution"
    if variant.relative_attention == "post_normalization":
        return "its relative bias is added after the softmax, and timm's before it"
    if not variant.head_hidden_layer:
        return "its head has no hidden layer, and timm's without one normalizes before it pools"
    return None


def timm_arguments(variant: Variant) -> dict[str, Any]:
    """The keyword arguments by which timm's `coatnet_0_224` becomes `variant`; plain JSON values."""
    batch = variant.convolution_norm == "batch"
    pool = "max2" if variant.pool == "max" else "avg2"
    return {
        "embed_dim": [stage.width for stage in variant.stages],
        "depths": [stage.depth for stage in variant.stages],
        "block_type": ["C" if stage.kind == "mbconv" else "T" for stage in variant.stages],
        "stem_width": variant.stem_width,
        "stem_bias": True,
        "head_hidden_size": variant.stages[-1].width,
        "conv_stride_mode": "1x1" if variant.stride_in == "expansion" else "dw",
        "conv_pool_type": pool,
        "conv_downsample_pool_type": pool,
        "conv_norm_layer": "batchnorm2d" if batch else "layernorm2d",
        "conv_norm_eps": 1e-3 if batch else 1e-5,
        "conv_act_layer": "gelu_tanh",
        "transformer_dim_head": variant.head_size,
        "transformer_pool_type": pool,
        "transformer_rel_pos_type": "bias_tf" if variant.relative_attention == "pre_normalization" else "",
        "transformer_norm_eps": 1e-5,
        "transformer_act_layer": "gelu_tanh",
    }


def timm_name(name: str, variant: Variant) -> str:
    """timm's name of our parameter or buffer `name`."""
    if not name.startswith("blocks."):
        return next((theirs + name[len(ours) :] for ours, theirs in _NAMES.items() if name.startswith(ours)), name)
    _, number, rest = name.split(".", 2)
    stage, position = _places(variant)[int(number)]
    ours = next(prefix for prefix in _NAMES_IN_BLOCKS if rest.startswith(prefix))
    theirs = _NAMES_IN_BLOCKS[ours]
    if ours == "attention_norm." and position > 0:
        theirs = "norm1."  # only the first block of a stage wraps it with its pooling
    return f"stages.{stage}.blocks.{position}.{theirs}{rest[len(ours) :]}"


def to_timm(tensors: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """timm's state of a model with our `tensors`, all of them, by timm's names, complete for a strict load."""
    state = {}
    for name, tensor in tensors.items():
        theirs = timm_name(name, variant)
        if name.endswith("relative_bias.table"):
            tensor = tensor.flip(1, 2)  # by the key's place less the query's
        elif ".attention.qkv." in name:
            # By head and then kind, where ours are by kind and then head.
            by_kind = tensor.reshape(3, -1, variant.head_size, *tensor.shape[1:])
            tensor = by_kind.transpose(0, 1).reshape(tensor.shape)
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # its linear layers are 1x1 convolutions
        state[theirs] = tensor.contiguous()
        if name.endswith("running_var"):
            state[theirs.removesuffix("running_var") + _COUNTER] = torch.zeros((), dtype=torch.int64)
    return state


def from_timm(state: Mapping[str, Tensor], names: Mapping[str, tuple[int, ...]], variant: Variant) -> dict[str, Tensor]:
    """The inverse of `to_timm`: our tensors of timm's `state`.

    Args:
        state: of a timm model of the same architecture.
        names: our names, with the shapes of the tensors that they have here but for relative tables, whose size may
            be another one.
        variant: ours.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape; names the first with both shapes.
    """
    tensors, unknown = {}, {name for name in state if not name.endswith(_COUNTER)}
    for name, shape in names.items():
        theirs = timm_name(name, variant)
        if theirs not in state:
            raise ValueError(f"{theirs} is missing")
        unknown.discard(theirs)
        tensor = state[theirs]
        table = name.endswith("relative_bias.table")
        linear = len(shape) == 2 and tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
        if linear:
            tensor = tensor[:, :, 0, 0]
        same = tensor.dim() == 3 and tensor.shape[0] == shape[0] if table else tuple(tensor.shape) == tuple(shape)
        if not same:
            raise ValueError(f"{theirs} is {tuple(state[theirs].shape)} there and {tuple(shape)} in this model")
        if table:
            tensor = tensor.flip(1, 2)
        elif ".attention.qkv." in name:
            by_head = tensor.reshape(-1, 3, variant.head_size, *tensor.shape[1:])
            tensor = by_head.transpose(0, 1).reshape(tensor.shape)
        tensors[name] = tensor
    if unknown:
        raise ValueError(f"{min(unknown)} and {len(unknown) - 1} more are not in this model")
    return tensors


def _places(variant: Variant) -> list[tuple[int, int]]:
    """Stage and position in it of every block."""
    return [(number, position) for number, stage in enumerate(variant.stages) for position in range(stage.depth)]
