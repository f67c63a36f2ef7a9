"""What JPEGs are encoded with, for recipes and records of builds, which do not encode any."""

from typing import Literal

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
"""The resolution of colour: that of the image, half of it horizontally, or half of it in both directions."""

QUALITY = 95
"""Unless another one is asked for, on libjpeg's scale of 1 to 100."""
SUBSAMPLING: Subsampling = "4:4:4"


def refuse_without_effect(quality: int, subsampling: Subsampling, encodes: bool) -> None:
    """
    Raises:
        ValueError: they differ from their defaults, and no image is encoded.
    """
    if not encodes and (quality, subsampling) != (QUALITY, SUBSAMPLING):
        raise ValueError(
            f"quality {quality} and subsampling {subsampling} are for images that are encoded again, and none is "
            "without a short side, convert or recompress; set one of these, or leave quality and subsampling out"
        )
