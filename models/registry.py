"""Models by name."""

from typing import Any

import torch

from models.coatnet import CoAtNet
from models.variants import find_variant


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> CoAtNet:
    """A CoAtNet, initialized.

    Args:
        name: a key of `models.variants.VARIANTS`, such as `coatnet_5`.
        num_classes: outputs of the classifier; 0 for none.
        image_size: pixels of a square image, or (height, width); see `CoAtNet`.
        drop_path_rate: stochastic depth of the last block.
        seed: of the initialization; the same seed gives the same weights on all devices of one kind.
        device: on which the model is created directly; by default torch's default device. On `meta` it has no values.
        options: override those of the variant; see `find_variant`.

    Raises:
        ValueError: an unknown name or option, or an error of `Variant` or `CoAtNet`.
    """
    variant = find_variant(name, **options)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    device = torch.get_default_device() if device is None else torch.device(device)
    # On meta, since torch's own initialization would take several times as long as ours and be overwritten.
    with torch.device("meta"):
        model = CoAtNet(variant, num_classes=num_classes, image_size=size, drop_path_rate=drop_path_rate)
    if device.type != "meta":
        model.to_empty(device=device).initialize(seed)
    return model
