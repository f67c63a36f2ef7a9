"""timm's CoAtNets: as registered, and configured as the paper's authors built theirs, with our weights in it.

timm is among the development dependencies; constraints.txt has the torchvision that belongs to its torch.
"""

from typing import Any

import torch
from torch import nn

from models.coatnet import CoAtNet
from models.timm_layout import timm_arguments, to_timm


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
    import timm

    theirs: nn.Module = timm.create_model(
        f"{name}_224", img_size=model.image_size, num_classes=num_classes, **timm_arguments(model.variant)
    )
    theirs.load_state_dict(to_timm(model.state_dict(), model.variant))
    return theirs
