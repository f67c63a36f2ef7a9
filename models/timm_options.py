"""Which of timm's CoAtNets compute the same as a variant of ours: its arguments for a variant of ours.

timm (`timm/models/maxxvit.py`, 1.0.31) builds many models from one file. `models.timm_differences` is the other
direction: what distinguishes weights of timm from a variant.
"""

from typing import Any

from models.variants import Variant

STRIDE_MODES = {"expansion": "1x1", "depthwise": "dw"}
POOL_TYPES = {"max": "max2", "average": "avg2"}
GELUS = {"tanh": "gelu_tanh", "exact": "gelu"}
BASE_MODEL = "coatnet_0_224"
"""The model of timm that `timm_arguments` alters."""


def timm_arguments(variant: Variant) -> dict[str, Any]:
    """The arguments by which `timm.create_model(BASE_MODEL, ...)` makes the model of `variant`.

    Without `num_classes` and `img_size`. JSON can hold them; timm takes them from `model_args` in its `config.json`.

    Raises:
        ValueError: timm has no such model; it names every reason.
    """
    reasons = []
    strides = [stage.stride for stage in variant.stages]
    if variant.stem != "convolutions":
        reasons.append("a stem of patches")
    if strides != [2] * len(strides):
        reasons.append(f"stages of strides {', '.join(map(str, strides))}, where each of timm's has 2")
    if variant.relative_attention == "post_normalization":
        reasons.append("a relative bias after the softmax")
    if not variant.head_hidden_layer:
        reasons.append("a head without a hidden layer: timm's then has its norm before the pooling")
    if reasons:
        raise ValueError(f"timm cannot express {'; '.join(reasons)}")
    batch = variant.convolution_norm == "batch"
    return {
        "stem_width": variant.stem_width,
        "embed_dim": [stage.width for stage in variant.stages],
        "depths": [stage.depth for stage in variant.stages],
        "block_type": ["C" if stage.kind == "mbconv" else "T" for stage in variant.stages],
        "stem_bias": True,
        "head_hidden_size": variant.stages[-1].width,
        "conv_norm_layer": "batchnorm2d" if batch else "layernorm2d",
        "conv_stride_mode": STRIDE_MODES[variant.stride_in],
        "conv_pool_type": POOL_TYPES[variant.pool],
        "conv_act_layer": GELUS[variant.gelu],
        "conv_norm_eps": variant.batch_norm_epsilon if batch else variant.layer_norm_epsilon,
        "transformer_pool_type": POOL_TYPES[variant.pool],
        "transformer_dim_head": variant.head_size,
        "transformer_rel_pos_type": "bias" if variant.relative_attention == "pre_normalization" else "",
        "transformer_act_layer": GELUS[variant.gelu],
        "transformer_norm_eps": variant.layer_norm_epsilon,
    }
