"""Model FLOP/s utilization (MFU): the share of its GPUs' peak that a run uses."""

import torch

from models.complexity import count_costs
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.ranks.gpus import PEAKS, known_gpu


def peak_operations(device: torch.device) -> float | None:
    """Dense bf16 operations per second of `device`, by its data sheet; None for an unknown device."""
    gpu = known_gpu(device)
    return PEAKS[gpu] if gpu else None


def operations_per_image(plan: TrainPlan) -> int:
    """Operations to train on one image: a backward counts as two forwards, a multiply-add as two operations.

    Recomputation by activation checkpointing is not counted, by the definition of MFU.
    """
    costs = count_costs(plan.stage.model.variant, plan.stage.resolution, len(plan.classes))
    return 3 * 2 * sum(cost.multiply_adds for cost in costs)


class Utilization:
    """MFU of a run, assuming that all ranks have the same GPU; there is none for devices whose peak is not known.

    The peak is that of bf16, even if the recipe says fp32.
    """

    def __init__(self, plan: TrainPlan, ranks: Ranks) -> None:
        peak = peak_operations(ranks.device)
        # Counting takes a second or two, so it is skipped if there is no peak to compare with.
        self._per_image = operations_per_image(plan) / (ranks.world_size * peak) if peak else None

    def at(self, images_per_second: float) -> float | None:
        """The share of the peak, 0 to 1."""
        return None if self._per_image is None else images_per_second * self._per_image
