"""Random erasing: the rectangles and values are those of timm with the same random numbers."""

import numpy as np
import pytest
import torch

from data.images.random_erasing import ErasingMode, RandomErasing
from pipeline.training.images import erase
from tests.support.timm_import import timm

timm_erasing = timm.data.random_erasing


class NumbersOf:
    """The functions of the module `random` that timm calls, and its normal values, drawn from a numpy generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.random = rng.random
        self.uniform = rng.uniform

    def randint(self, least: int, greatest: int) -> int:
        return int(self.rng.integers(least, greatest, endpoint=True))

    def pixels(self, per_pixel: bool, rand_color: bool, shape: tuple[int, int, int], **where: object) -> torch.Tensor:
        if not per_pixel and not rand_color:
            return torch.zeros((3, 1, 1))
        size = (*shape[1:], 3) if per_pixel else (1, 1, 3)
        return torch.from_numpy(self.rng.standard_normal(size, np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [16, 57])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize(("probability", "max_count"), [(1.0, 1), (0.5, 1), (0.7, 3)])
def test_erased_images_equal_timms_with_the_same_random_numbers(
    monkeypatch: pytest.MonkeyPatch, size: int, mode: ErasingMode, probability: float, max_count: int
) -> None:
    images = torch.randn(60, size, size, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = images.clone(), images.clone()
    erasing = RandomErasing(probability, mode, max_count)
    reference = timm_erasing.RandomErasing(probability, mode=mode, max_count=max_count, device="cpu")
    for position in range(len(images)):
        found = erasing.rectangles(size, np.random.default_rng(position))
        erase(ours, [(position, rectangle) for rectangle in found])
        numbers = NumbersOf(np.random.default_rng(position))
        monkeypatch.setattr(timm_erasing, "random", numbers)
        monkeypatch.setattr(timm_erasing, "_get_pixels", numbers.pixels)
        reference(theirs[position].permute(2, 0, 1))
    assert torch.equal(ours, theirs)
    untouched = (ours == images).flatten(1).all(dim=1).float().mean()
    assert abs(untouched - (1 - probability)) < 0.2


def test_a_probability_of_zero_erases_nothing() -> None:
    assert not any(RandomErasing(0.0).rectangles(32, np.random.default_rng(seed)) for seed in range(1000))
