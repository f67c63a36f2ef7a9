"""The values of the options by which a recipe or a caller chooses between forms of the model."""

from typing import Literal

BiasPlace = Literal["pre_normalization", "post_normalization", "none"]
"""Where attention adds its relative bias: before the softmax, after it, or nowhere."""

ConvolutionNorm = Literal["batch", "layer"]
"""The norm of stem and MBConv: BatchNorm, or LayerNorm over channels."""

Pooling = Literal["max", "average"]
"""The 2x2 pooling where a stage strides."""

StridePlace = Literal["expansion", "depthwise"]
"""Where MBConv strides: in its first 1x1 convolution or in the depthwise one."""

Gelu = Literal["tanh", "exact"]
"""GELU by its approximation with tanh, as in MaxViT's code, or by the error function, as timm has it."""

APPROXIMATION: dict[Gelu, str] = {"tanh": "tanh", "exact": "none"}
"""What `torch.nn.functional.gelu` calls them."""

CheckpointingPolicy = Literal["none", "every_block", "mbconv"] | int
"""Which blocks are recomputed in the backward: none, all, the convolutional ones (stem and MBConv, which have the
largest activations), or every k-th one. The stem counts as a block."""
