"""timm's CoAtNets: as registered, and configured as the paper's authors built theirs, with our weights in it.

timm is not a dependency. To install it for this benchmark: `pip install --no-deps timm==1.0.31 torchvision==0.28.0
huggingface_hub`; this torchvision belongs to the torch of constraints.txt.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.coatnet import CoAtNet


def import_timm() -> Any:
    """The module `timm`.

    Raises:
        ImportError: it is not installed.
    """
    if not torch.cuda.is_available():
        # torchvision's compiled half needs CUDA; its import looks for the schemas of two operations defined there.
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def like_ours(model: CoAtNet, name: str, num_classes: int) -> nn.Module:
    """timm's `name` with the authors' choices where timm made others, holding the weights and statistics of `model`."""
    from timm.models.maxxvit import MaxxVit, model_cfgs

    published = model_cfgs[name]
    theirs: nn.Module = MaxxVit(
        replace(
            published,
            stem_bias=True,
            conv_cfg=replace(
                published.conv_cfg, stride_mode="1x1", pool_type="max2", downsample_pool_type="max2", norm_eps=1e-3,
                act_layer="gelu_tanh",
            ),
            transformer_cfg=replace(
                published.transformer_cfg, dim_head=model.variant.head_size, pool_type="max2", rel_pos_type="bias_tf",
                norm_eps=1e-5, act_layer="gelu_tanh",
            ),
        ),
        img_size=model.image_size,
        num_classes=num_classes,
    )  # fmt: skip
    state = {_timm_name(key, model): _timm_layout(key, value, model) for key, value in model.state_dict().items()}
    wanted = theirs.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    assert state.keys() == wanted.keys() - counters, sorted(state.keys() ^ (wanted.keys() - counters))[:4]
    theirs.load_state_dict({key: value.reshape(wanted[key].shape) for key, value in state.items()}, strict=False)
    return theirs


_NAMES = {
    "stem.norm.": "stem.norm1.",
    "head.hidden.": "head.pre_logits.fc.",
    "head.classifier.": "head.fc.",
    "shortcut.": "shortcut.expand.",
    "expand_norm.": "norm1.",
    "depthwise_norm.": "norm2.",
    "expand.": "conv1_1x1.",
    "depthwise.": "conv2_kxk.",
    "squeeze_excitation.squeeze.": "se.fc1.",
    "squeeze_excitation.excite.": "se.fc2.",
    "shrink.": "conv3_1x1.",
    "norm.": "pre_norm.",
    "attention_norm.": "norm1.norm.",
    "attention.qkv.": "attn.qkv.",
    "attention.relative_bias.table": "attn.rel_pos.relative_position_bias_table",
    "attention.out.": "attn.proj.",
    "feed_forward_norm.": "norm2.",
    "feed_forward.expand.": "mlp.fc1.",
    "feed_forward.shrink.": "mlp.fc2.",
}


def _timm_name(key: str, model: CoAtNet) -> str:
    if not key.startswith("blocks."):
        return next((theirs + key[len(ours) :] for ours, theirs in _NAMES.items() if key.startswith(ours)), key)
    _, number, rest = key.split(".", 2)
    places = [(n, position) for n, stage in enumerate(model.variant.stages) for position in range(stage.depth)]
    stage_number, position = places[int(number)]
    ours = next(prefix for prefix in _NAMES if rest.startswith(prefix))
    theirs = _NAMES[ours]
    if ours == "attention_norm." and position > 0:
        theirs = "norm1."  # only the first block of a stage wraps it with its pooling
    return f"stages.{stage_number}.blocks.{position}.{theirs}{rest[len(ours) :]}"


def _timm_layout(key: str, value: Tensor, model: CoAtNet) -> Tensor:
    """timm orders q, k and v by head, then kind, and its tables by the key's place less the query's."""
    if key.endswith("relative_bias.table"):
        return value.flip(1, 2)
    if ".attention.qkv." in key:
        by_kind = value.reshape(3, -1, model.variant.head_size, *value.shape[1:])
        return by_kind.transpose(0, 1).reshape(value.shape)
    return value
