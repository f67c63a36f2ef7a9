"""Models by name."""

import difflib

import torch

from models.coatnet import CoAtNet
from models.variants import VARIANTS


def create_model(
    name: str, *, num_classes: int, image_size: int | tuple[int, int] = 224, drop_path_rate: float = 0.0, seed: int = 0
) -> CoAtNet:
    """A CoAtNet on the current default device, initialized unless that is the meta device.

    Args:
        name: a key of `models.variants.VARIANTS`, such as `coatnet_5`.
        num_classes: outputs of the classifier.
        image_size: pixels of a square picture, or (height, width).
        drop_path_rate: stochastic depth of the last block.
        seed: of the initialization.

    Raises:
        ValueError: an unknown name, or what `CoAtNet` refuses.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, 1)
        raise ValueError(f"unknown model {name}; " + (f"did you mean {near[0]}?" if near else "see models/variants.py"))
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    model = CoAtNet(VARIANTS[name], num_classes=num_classes, image_size=size, drop_path_rate=drop_path_rate)
    device = model.head.classifier.weight.device
    if device.type != "meta":
        model.initialize(torch.Generator(device).manual_seed(seed))
    return model
