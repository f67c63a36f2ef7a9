"""What distinguishes weights with timm's names from a variant of ours, and which option of ours would match.

Much can be seen in names and shapes of tensors. The place of a stride, the pooling, activations and epsilons leave no
trace there; they are in the `config.json` that timm stores beside the weights. Without one, weights that have the
structure of timm's `coatnet_0` to `coatnet_5` are taken for those. The weights that timm publishes as
`coatnet_..._rw` are of other architectures.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from models.differences import ArchitectureDifference, layout_text, matching_blocks
from models.mbconv import EXPANSION, SQUEEZE
from models.timm_layout import GELUS, POOL_TYPES, STRIDE_MODES, table_shape
from models.variants import VARIANTS, BlockStage, Variant

_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)")
_TABLE = "attn.rel_pos.relative_position_bias_table"

_PAPER_NAME = re.compile(r"coatnet_[0-5](_224)?")
_PAPER = {
    "conv_stride_mode": "dw",
    "conv_pool_type": "avg2",
    "transformer_pool_type": "avg2",
    "conv_act_layer": "gelu",
    "transformer_act_layer": "gelu",
    "conv_norm_eps": 1e-5,
    "transformer_norm_eps": 1e-6,
    "conv_pre_norm_act": False,
    "conv_padding": "",
}
"""Of timm's `coatnet_0` to `coatnet_5`, by the arguments of `timm.create_model`, what tensors do not show."""


class TimmWeights:
    """Weights with timm's names.

    Args:
        shapes: of each tensor.
        architecture: timm's name of the model from its `config.json`; None without one.
        arguments: `model_args` from there.

    Raises:
        ValueError: they are not a CoAtNet's, or the arguments are none of timm's.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        architecture: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.shapes = shapes
        self.architecture = architecture
        self._blocks: dict[tuple[int, int], dict[str, Sequence[int]]] = {}
        for name, shape in shapes.items():
            if match := _BLOCK.fullmatch(name):
                self._blocks.setdefault((int(match[1]), int(match[2])), {})[match[3]] = shape
        if not self._blocks or "stem.conv1.weight" not in shapes or "stem.conv2.weight" not in shapes:
            raise ValueError(
                "its tensors are not those of a CoAtNet: there is no stem.conv1.weight with stages.0.blocks.0"
            )
        own = {key: value for key, value in (arguments or {}).items() if key in _PAPER and value is not None}
        for key, value in own.items():
            if not isinstance(value, type(_PAPER[key])):
                raise ValueError(f"{key} {str(value)[:40]!r} in its model_args is none of timm's values")
        registered = _PAPER_NAME.fullmatch(architecture) if architecture else self._is_as_registered()
        self.arguments: Mapping[str, Any] = _PAPER | own if registered else own
        """What tensors do not show, by the arguments of timm, as far as it is known."""

    def _is_as_registered(self) -> bool:
        """Whether the tensors are as those of timm's `coatnet_0` to `coatnet_5`, which its users alter by arguments."""
        tables = {len(block[_TABLE]) for block in self._blocks.values() if _TABLE in block}
        visible = (part.theirs(self) == part.ours(_AS_TIMM) for part in _PARTS if part.fixed)
        return "stem.conv1.bias" not in self.shapes and tables <= {2} and all(visible)

    def differences(self, variant: Variant) -> list[ArchitectureDifference]:
        """Every part in which the weights differ from `variant`, in the order of the model."""
        found = []
        for part in _PARTS:
            theirs, ours = part.theirs(self), part.ours(variant)
            if theirs is not None and theirs != ours:
                found.append(ArchitectureDifference(part.name, str(theirs), str(ours), part.option(theirs, variant)))
        return found

    def unknown(self) -> list[str]:
        """Arguments of timm that decide what the model computes and are not known."""
        return [argument for argument in _PAPER if argument not in self.arguments]

    def assumptions(self) -> list[str]:
        """What is taken for given where no `config.json` tells: a phrase for each part."""
        return [] if self.architecture else [f"{part.name}: {part.theirs(self)}" for part in _PARTS if part.hidden]

    def of_blocks(self, kind: str, value: Callable[[tuple[int, int], dict[str, Sequence[int]]], Any]) -> Any:
        """The value that all blocks of a kind have in common, or their values in a row; None where there is none."""
        values = [value(place, block) for place, block in sorted(self._blocks.items()) if _kind(block) == kind]
        values = list(dict.fromkeys(v for v in values if v is not None))
        return values[0] if len(values) == 1 else " or ".join(map(str, values)) or None

    @property
    def layout(self) -> tuple[int, tuple[BlockStage, ...]] | None:
        """Width of the stem, and the stages; None where they are no stages of ours."""
        stages: list[BlockStage] = []
        for number in range(1 + max(stage for stage, _ in self._blocks)):
            blocks = [block for (stage, _), block in sorted(self._blocks.items()) if stage == number]
            kinds = {_kind(block) for block in blocks}
            if len(kinds) != 1 or not (kind := kinds.pop()) or (width := _width(blocks[0])) is None:
                return None
            stages.append(BlockStage("mbconv" if kind == "mbconv" else "transformer", len(blocks), width))
        return self.shapes["stem.conv2.weight"][0], tuple(stages)


def _kind(block: Collection[str]) -> str | None:
    """`mbconv`, `transformer`, or None for a block of another model."""
    if "conv2_kxk.weight" in block:
        return "mbconv"
    return "transformer" if "attn.qkv.weight" in block else None


def _width(block: Mapping[str, Sequence[int]]) -> int | None:
    shape = block.get("conv3_1x1.weight", block.get("attn.proj.weight"))
    return shape[0] if shape else None


class _Part(NamedTuple):
    """A part of the model: its form in weights of timm (None where they have none), and in a variant."""

    name: str
    theirs: Callable[[TimmWeights], Any]
    ours: Callable[[Variant], Any]
    option: Callable[[Any, Variant], str | None] = lambda theirs, variant: None
    hidden: bool = False
    """Whether only a `config.json` tells."""

    @property
    def fixed(self) -> bool:
        """Whether tensors show it and all of timm's `coatnet_0` to `coatnet_5` have one form of it."""
        return not self.hidden and self.name not in ("blocks", "size of an attention head")


def _their_blocks(weights: TimmWeights) -> str:
    return (
        layout_text(*weights.layout)
        if weights.layout
        else "stages of several kinds of blocks, or of others than CoAtNet's"
    )


def _expansion(place: tuple[int, int], block: Mapping[str, Sequence[int]]) -> str | None:
    hidden, before, width = block["conv1_1x1.weight"][0], block["conv1_1x1.weight"][1], _width(block)
    if hidden == EXPANSION * (width or 0):
        return f"{EXPANSION} times the output width"
    return f"{EXPANSION} times the input width" if hidden == EXPANSION * before else f"{hidden} channels"


def _squeeze(place: tuple[int, int], block: Mapping[str, Sequence[int]]) -> str:
    squeezed = block.get("se.fc1.weight", block.get("se_early.fc1.weight"))
    where = "after the second norm" if "se.fc1.weight" in block else "before the second norm"
    if squeezed is None:
        return "none"
    right = squeezed[0] == max(1, int(SQUEEZE * (_width(block) or 0)))
    return f"{where}, to {SQUEEZE if right else 'another share'} of the output width"


def _queries(place: tuple[int, int], block: Mapping[str, Sequence[int]]) -> str:
    inner = block["attn.qkv.weight"][0] // 3
    return "of the output width" if inner == _width(block) else "of the input width"


def _head_size(place: tuple[int, int], block: Mapping[str, Sequence[int]]) -> int | None:
    table = block.get(_TABLE)
    return None if table is None else block["attn.qkv.weight"][0] // 3 // table_shape(table, _TABLE)[0]


def _relative(place: tuple[int, int], block: Mapping[str, Sequence[int]]) -> str:
    if _TABLE in block:
        return "a table, added before the softmax"
    return "computed by an MLP" if any(name.startswith("attn.rel_pos.") for name in block) else "none"


_BIAS_PLACES = {
    "pre_normalization": "a table, added before the softmax",
    "post_normalization": "a table, added after the softmax",
    "none": "none",
}


_HEAD_OPTIONS = {
    "a hidden layer of tanh": "model.head_hidden_layer: true",
    "no hidden layer": "model.head_hidden_layer: false",
}


def _stem_widths(weights: TimmWeights) -> str:
    first, second = (weights.shapes[f"stem.conv{number}.weight"][0] for number in (1, 2))
    return "equal" if first == second else f"{first} and {second}"


def _head(weights: TimmWeights) -> str:
    if "head.norm.weight" not in weights.shapes:
        return "norm, then pooling, and no hidden layer"
    hidden, width = weights.shapes.get("head.pre_logits.fc.weight"), weights.shapes["head.norm.weight"][0]
    if hidden is None:
        return "no hidden layer"
    return "a hidden layer of tanh" if hidden[0] == width else f"a hidden layer of {hidden[0]} channels"


def _norm(weights: TimmWeights) -> str:
    return "batch" if "stem.norm1.running_mean" in weights.shapes else "layer"


def _reverse(table: Mapping[str, str], value: Any) -> Any:
    """Our name of timm's `value`, or that itself."""
    return next((ours for ours, theirs in table.items() if theirs == value), value)


def _argument(
    name: str, argument: str, option: str, ours: Callable[[Variant], Any], table: Mapping[str, str] = {}
) -> _Part:
    """A part that only a `config.json` tells, by the argument of timm that sets it."""

    def matching(theirs: Any, variant: Variant) -> str | None:
        return f"model.{option}: {theirs}" if not table or theirs in table else None

    return _Part(name, lambda w: _reverse(table, w.arguments.get(argument)), ours, matching, hidden=True)


def _convolution_epsilon(variant: Variant) -> float:
    return variant.batch_norm_epsilon if variant.convolution_norm == "batch" else variant.layer_norm_epsilon


_PARTS: tuple[_Part, ...] = (
    _Part("blocks", _their_blocks, lambda v: layout_text(v.stem_width, v.stages), matching_blocks),
    _Part("widths of the stem's two convolutions", _stem_widths, lambda v: "equal"),
    _Part(
        "norm of stem and MBConv", _norm, lambda v: v.convolution_norm,
        lambda kind, _: f"model.convolution_norm: {kind}",
    ),
    _Part(
        "hidden width of MBConv", lambda w: w.of_blocks("mbconv", _expansion),
        lambda v: f"{EXPANSION} times the output width",
    ),
    _Part(
        "squeeze-and-excitation",
        lambda w: w.of_blocks("mbconv", _squeeze),
        lambda v: f"after the second norm, to {SQUEEZE} of the output width",
    ),
    _Part(
        "bias of MBConv's last convolution",
        lambda w: w.of_blocks("mbconv", lambda _, block: _yes("conv3_1x1.bias" in block)),
        lambda v: "yes",
    ),
    _Part(
        "norm of Transformer blocks",
        lambda w: w.of_blocks("transformer", lambda _, block: "batch" if "norm2.running_mean" in block else "layer"),
        lambda v: "layer",
    ),
    _Part(
        "bias of the Transformer's shortcut",
        lambda w: w.of_blocks(
            "transformer",
            lambda _, block: None if "shortcut.expand.weight" not in block else _yes("shortcut.expand.bias" in block),
        ),
        lambda v: "yes",
    ),
    _Part("queries, keys and values", lambda w: w.of_blocks("transformer", _queries), lambda v: "of the output width"),
    _Part(
        "size of an attention head",
        lambda w: w.of_blocks("transformer", _head_size),
        lambda v: v.head_size,
        lambda size, _: f"model.head_size: {size}" if isinstance(size, int) else None,
    ),
    _Part(
        "relative bias",
        lambda w: w.of_blocks("transformer", _relative),
        lambda v: _BIAS_PLACES[v.relative_attention],
        lambda theirs, _: next(
            (f"model.relative_attention: {k}" for k in _BIAS_PLACES if _BIAS_PLACES[k] == theirs), None
        ),
    ),
    _Part(
        "scale of a layer's output",
        lambda w: w.of_blocks("transformer", lambda _, block: "learned" if "ls1.gamma" in block else "none"),
        lambda v: "none",
    ),
    _Part(
        "head", _head, lambda v: "a hidden layer of tanh" if v.head_hidden_layer else "no hidden layer",
        lambda theirs, _: _HEAD_OPTIONS.get(theirs),
    ),
    _argument("stride of MBConv in", "conv_stride_mode", "stride_in", lambda v: v.stride_in, STRIDE_MODES),
    _argument("pooling of MBConv's shortcut", "conv_pool_type", "pool", lambda v: v.pool, POOL_TYPES),
    _argument("pooling of Transformer blocks", "transformer_pool_type", "pool", lambda v: v.pool, POOL_TYPES),
    _argument("GELU of stem and MBConv", "conv_act_layer", "gelu", lambda v: v.gelu, GELUS),
    _argument("GELU of Transformer blocks", "transformer_act_layer", "gelu", lambda v: v.gelu, GELUS),
    _argument("epsilon of the norms of stem and MBConv", "conv_norm_eps", "batch_norm_epsilon", _convolution_epsilon),
    _argument(
        "epsilon of the other norms", "transformer_norm_eps", "layer_norm_epsilon", lambda v: v.layer_norm_epsilon
    ),
    _Part(
        "activation after MBConv's first norm", lambda w: _argument_text(w, "conv_pre_norm_act", "none"),
        lambda v: "none", hidden=True,
    ),
    _Part(
        "padding", lambda w: _argument_text(w, "conv_padding", "symmetric"), lambda v: "symmetric", hidden=True,
    ),
)  # fmt: skip

_AS_TIMM = VARIANTS["coatnet_0"]
"""What can be seen of timm's `coatnet_0`, but for its sizes."""


def _argument_text(weights: TimmWeights, argument: str, none: str) -> str | None:
    value = weights.arguments.get(argument)
    return None if argument not in weights.arguments else str(value or none)


def _yes(value: object) -> str:
    return "yes" if value else "no"
