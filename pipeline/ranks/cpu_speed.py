"""How fast the cores of this machine train, measured: the table of peaks is for GPUs."""

import time

import torch

from models.complexity import count_training_cost
from models.registry import create_model
from models.variants import VARIANTS

_MODEL, _PIXELS, _IMAGES = "coatnet_nano", 64, 16


def training_rate(seconds: float = 1.0) -> float:
    """Operations per second of one core that trains a small CoAtNet in fp32; a multiply-add is two operations.

    Other models and sizes reach from half to twice that. Takes `seconds` and the first two steps.
    """
    cost = count_training_cost(VARIANTS[_MODEL], _PIXELS).multiply_adds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = create_model(_MODEL, num_classes=10, image_size=_PIXELS)
        images = torch.zeros(_IMAGES, _PIXELS, _PIXELS, 3)
        for step in range(10**6):
            if step == 2:  # the first ones allocate
                began = time.thread_time()
            model(images).sum().backward()
            if step > 2 and (spent := time.thread_time() - began) > seconds:
                return 2 * cost * _IMAGES * (step - 1) / spent
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("a clock that stands still")
