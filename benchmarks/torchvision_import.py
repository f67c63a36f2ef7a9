"""Imports of packages that import torchvision."""

import importlib
from typing import Any

import torch


def import_with_torchvision(name: str) -> Any:
    """The module `name`, which imports torchvision.

    Raises:
        ImportError: it is not installed.
    """
    if not torch.cuda.is_available():
        # torchvision's compiled half needs CUDA; its import looks for the schemas of two operations defined there.
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
