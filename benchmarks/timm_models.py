"""timm's CoAtNets: as registered, and configured as the paper's authors built theirs, with our weights in it.

timm is among the development dependencies; constraints.txt has the torchvision that belongs to its torch.
"""

from typing import Any

from torch import nn

from benchmarks.torchvision_import import import_with_torchvision
from models.coatnet import CoAtNet
from models.timm_layout import timm_arguments, to_timm


def import_timm() -> Any:
    """The module `timm`.

    Raises:
        ImportError: it is not installed.
    """
    return import_with_torchvision("timm")


def like_ours(model: CoAtNet, name: str, num_classes: int) -> nn.Module:
    """timm's `name` with the authors' choices where timm made others, holding the weights and statistics of `model`."""
    import timm

    theirs: nn.Module = timm.create_model(
        f"{name}_224", img_size=model.image_size, num_classes=num_classes, **timm_arguments(model.variant)
    )
    theirs.load_state_dict(to_timm(model.state_dict(), model.variant))
    return theirs
