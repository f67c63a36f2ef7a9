"""timm's names for the tensors of CoAtNet, and the order of numbers in them, both ways.

Of timm's `timm/models/maxxvit.py` (1.0.31), which has CoAtNet in other modules: a list of blocks for each stage, 1x1
convolutions instead of linear layers, queries, keys and values ordered by the head, and two forms of the relative
table. `models.timm_options` says which of its models compute the same.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.variants import Variant

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


def timm_names(names: Sequence[str], variant: Variant) -> dict[str, str]:
    """timm's name by each of our `names`; see `timm_name`."""
    return {name: timm_name(name, variant) for name in names}


def to_timm(state: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """The state of a CoAtNet of `variant` in timm's names and order, relative tables in the form `bias`.

    Besides our parameters and buffers it has the counters of timm's BatchNorm, which nothing reads, at zero. The
    shapes are those of timm: those of 1x1 convolutions (D_out, D_in, 1, 1) but for the two layers of the head.

    Raises:
        ValueError: timm has no such parameter.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = timm_name(name, variant)
        if name.endswith(".table"):
            tensor = tensor.flatten(1).t()
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
