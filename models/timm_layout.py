"""timm's CoAtNets and ours: which of our variants timm can express, by what arguments, and its names for our tensors.

Read from timm 1.0.31, `timm/models/maxxvit.py`, which has a list of blocks for each stage, 1x1 convolutions instead of
linear layers, queries, keys and values ordered by the head, and two forms of the relative table. timm's registered
`coatnet_N_224` differ from the paper's: average pooling, the stride in the depthwise convolution, exact GELU, other
epsilons. `timm_arguments` makes them equal; `models.timm_differences` is for weights that others have trained.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.variants import Variant

STRIDE_MODES = {"expansion": "1x1", "depthwise": "dw"}
POOL_TYPES = {"max": "max2", "average": "avg2"}
GELUS = {"tanh": "gelu_tanh", "exact": "gelu"}

# Of the modules outside of the blocks and inside of them: ours, timm's.
_STEM_AND_HEAD = {
    "stem.conv1": "stem.conv1",
    "stem.norm": "stem.norm1",
    "stem.conv2": "stem.conv2",
    "head.norm": "head.norm",
    "head.hidden": "head.pre_logits.fc",
    "head.classifier": "head.fc",
}
_MBCONV = {
    "shortcut": "shortcut.expand",
    "norm": "pre_norm",
    "expand": "conv1_1x1",
    "expand_norm": "norm1",
    "depthwise": "conv2_kxk",
    "depthwise_norm": "norm2",
    "squeeze_excitation.squeeze": "se.fc1",
    "squeeze_excitation.excite": "se.fc2",
    "shrink": "conv3_1x1",
}
_TRANSFORMER = {
    "shortcut": "shortcut.expand",
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.relative_bias": "attn.rel_pos",
    "attention.out": "attn.proj",
    "feed_forward_norm": "norm2",
    "feed_forward.expand": "mlp.fc1",
    "feed_forward.shrink": "mlp.fc2",
}
_TABLE = "relative_position_bias_table"

STEM_BIASES = ("stem.conv1.bias", "stem.conv2.bias")
"""Parameters of ours that timm's models have only with `stem_bias`. Zeros in their place compute the same."""


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
    batch, pool = variant.convolution_norm == "batch", POOL_TYPES[variant.pool]
    return {
        "embed_dim": [stage.width for stage in variant.stages],
        "depths": [stage.depth for stage in variant.stages],
        "block_type": ["C" if stage.kind == "mbconv" else "T" for stage in variant.stages],
        "stem_width": variant.stem_width,
        "stem_bias": True,
        "head_hidden_size": variant.stages[-1].width,
        "conv_stride_mode": STRIDE_MODES[variant.stride_in],
        "conv_pool_type": pool,
        "conv_downsample_pool_type": pool,
        "conv_norm_layer": "batchnorm2d" if batch else "layernorm2d",
        "conv_norm_eps": variant.batch_norm_epsilon if batch else variant.layer_norm_epsilon,
        "conv_act_layer": GELUS[variant.gelu],
        "transformer_dim_head": variant.head_size,
        "transformer_pool_type": pool,
        "transformer_rel_pos_type": "bias_tf" if variant.relative_attention == "pre_normalization" else "",
        "transformer_norm_eps": variant.layer_norm_epsilon,
        "transformer_act_layer": GELUS[variant.gelu],
    }


def timm_name(name: str, variant: Variant) -> str:
    """timm's name of the parameter or buffer `name` of a model of `variant`.

    Raises:
        ValueError: timm has no such parameter.
    """
    module, _, leaf = name.rpartition(".")
    if not module.startswith("blocks."):
        theirs = _STEM_AND_HEAD.get(module)
        prefix = ""
    else:
        _, number, module = module.split(".", 2)
        stage, block = _places(variant)[int(number)]
        names = _MBCONV if variant.stages[stage].kind == "mbconv" else _TRANSFORMER
        theirs = names.get(module)
        prefix = f"stages.{stage}.blocks.{block}."
        if module == "attention_norm" and block == 0:
            theirs = "norm1.norm"  # in one module with the pooling
    if theirs is None:
        raise ValueError(f"timm's CoAtNet has no parameter in the place of {name}")
    return f"{prefix}{theirs}.{_TABLE if leaf == 'table' else leaf}"


def to_timm(state: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """timm's state of a model with our `state`, by its names, complete for a strict load.

    Relative tables have the form `bias_tf`. The counters of timm's BatchNorm, which nothing reads, are zero. Shapes are
    those of timm: those of 1x1 convolutions (D_out, D_in, 1, 1) but for the two layers of the head.

    Raises:
        ValueError: timm has no such parameter.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = timm_name(name, variant)
        if name.endswith(".table"):
            tensor = tensor.flip(1, 2)  # by the place of the key less that of the query
        elif ".attention.qkv." in name:
            tensor = _regrouped(tensor, (3, -1, variant.head_size))
        if tensor.ndim == 2 and name.startswith("blocks.") and not name.endswith(".table"):
            tensor = tensor[:, :, None, None]
        found[theirs] = tensor.contiguous()
        if name.endswith(".running_var"):
            found[theirs.removesuffix("running_var") + "num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return found


def from_timm(state: Mapping[str, Tensor], names: Sequence[str], variant: Variant) -> dict[str, Tensor]:
    """The tensors of a timm CoAtNet by our `names`, without those that `state` lacks; float32.

    Relative tables of both forms become (heads, 2h-1, 2w-1); those of the form `bias` are taken for square.

    Raises:
        ValueError: a tensor cannot have the order that its name says.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        tensor = state.get(timm_name(name, variant))
        if tensor is None:
            continue
        if name.endswith(".table"):
            tensor = _table_of(tensor, name)
        elif ".attention.qkv." in name:
            tensor = _regrouped(tensor, (-1, 3, variant.head_size))
        if tensor.ndim == 4 and not name.endswith(("conv1.weight", "conv2.weight", "depthwise.weight")):
            tensor = tensor.flatten(2).squeeze(2)
        found[name] = tensor.float().contiguous()
    return found


def table_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    """(heads, 2h-1, 2w-1) of a relative table of timm with this `shape`, of either form.

    Raises:
        ValueError: it has neither.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    side = math.isqrt(shape[0]) if len(shape) == 2 else 0
    if side % 2 == 0 or side * side != shape[0]:
        raise ValueError(f"{name}: {tuple(shape)} is no relative table of a square grid")
    return shape[1], side, side


def _table_of(tensor: Tensor, name: str) -> Tensor:
    shape = table_shape(tensor.shape, name)
    # The form `bias` has the place of the query less that of the key, as ours; `bias_tf` has the reverse.
    return tensor.flip(1, 2) if tensor.ndim == 3 else tensor.t().reshape(shape)


def _regrouped(tensor: Tensor, groups: tuple[int, int, int]) -> Tensor:
    """Rows of queries, keys and values with their two outer groups exchanged: by the head, or by the kind."""
    return tensor.reshape(*groups, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _places(variant: Variant) -> list[tuple[int, int]]:
    """Stage, and place in it, of each block."""
    return [(stage, block) for stage, blocks in enumerate(variant.stages) for block in range(blocks.depth)]
