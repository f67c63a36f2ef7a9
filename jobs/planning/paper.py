"""What the paper prints of the cost of training, to compare with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrintedCost:
    """A row of the paper's tables on JFT."""

    model: str
    data: str
    core_days: str
    """TPUv3-core-days of pretraining, in thousands, as printed."""
    top1: float
    """Of ImageNet-1K at 512 pixels, in per cent."""
    recipe: str | None = None
    """The recipe that comes with the program, if there is one."""


PRINTED = (
    PrintedCost("CoAtNet-3 (strided depthwise)", "JFT-300M", "0.58K", 88.81, "coatnet-3-jft"),
    PrintedCost("CoAtNet-4", "JFT-300M", "0.95K", 89.11, "coatnet-4-jft"),
    PrintedCost("CoAtNet-5", "JFT-300M", "1.82K", 89.77, "coatnet-5-jft"),
    PrintedCost("NFNet-F4+", "JFT-300M", "1.86K", 89.2),
    PrintedCost("ViT-H/14", "JFT-300M", "2.5K", 88.55),
    PrintedCost("CoAtNet-6", "JFT-3B", "6.6K", 90.45, "coatnet-6-jft3b"),
    PrintedCost("CoAtNet-7", "JFT-3B", "20.1K", 90.88, "coatnet-7-jft3b"),
    PrintedCost("ViT-G/14", "JFT-3B", ">30K", 90.45),
)
"""Dai et al., arXiv 2106.04803 v2, Table 5 with Tables 12 and 13 of its appendix."""
