"""The pooling of blocks that stride."""

from torch import Tensor
from torch.nn import functional as F

from models.options import Pooling


def pool_by_two(x_BHWC: Tensor, kind: Pooling) -> Tensor:
    """2x2 pooling of stride 2, (B, H, W, C) -> (B, H/2, W/2, C)."""
    pool = F.max_pool2d if kind == "max" else F.avg_pool2d
    return pool(x_BHWC.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
