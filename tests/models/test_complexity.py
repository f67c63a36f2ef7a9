"""Golden sizes: parameters to the unit, multiply-adds as the paper's tables imply, activations as autograd keeps them."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.complexity import (
    PUBLISHED,
    count_costs,
    count_parameters,
    count_parameters_without_dense_head,
    count_training_cost,
)
from models.registry import create_model
from models.variants import VARIANTS, find_variant

# 1000 classes, tables for 224 pixels: with the hidden layer of the head, and without.
PARAMETERS = {
    "coatnet_0": (25_036_948, 24_446_356),
    "coatnet_1": (42_225_904, 41_635_312),
    "coatnet_2": (74_685_000, 73_635_400),
    "coatnet_3": (166_966_648, 164_605_816),
    "coatnet_4": (275_425_672, 273_064_840),
    "coatnet_5": (687_053_336, 682_856_984),
    "coatnet_6": (1_471_125_616, 1_461_685_360),
    "coatnet_6_table12": (1_348_435_424, 1_344_239_072),
    "coatnet_7": (2_441_973_112, 2_432_532_856),
}
# Billions at 224, 384 and 512 pixels: what the tables imply, without norms, softmax and look-ups.
MULTIPLY_ADDS = {
    "coatnet_0": (4.142, 13.05, 25.05),
    "coatnet_1": (8.24, 26.60, 52.32),
    "coatnet_2": (15.50, 48.75, 93.35),
    "coatnet_3": (34.37, 105.79, 198.11),
    "coatnet_4": (60.24, 186.50, 351.46),
    "coatnet_5": (142.18, 433.62, 803.98),
    "coatnet_6": (265.2, 807.7, 1495.5),
    "coatnet_6_table12": (259.48, 790.88, 1465.42),
    "coatnet_7": (457.9, 1383.4, 2538.5),
    "coatnet_0_dw": (4.547, 14.24, 27.16),
    "coatnet_1_dw": (8.64, 27.79, 54.43),
    "coatnet_2_dw": (16.43, 51.46, 98.18),
    "coatnet_3_dw": (36.45, 111.91, 208.98),
}

OPTIONS: dict[str, Any] = {"relative_attention": "none", "depths": (2, 3, 2, 2)}


def multiply_adds(name: str, size: int) -> int:
    return sum(cost.multiply_adds for cost in count_costs(VARIANTS[name], size))


@pytest.mark.parametrize("suffix", ["", "_dw"])
@pytest.mark.parametrize(("name", "counts"), PARAMETERS.items())
def test_parameters_equal_the_tables_to_the_unit(name: str, suffix: str, counts: tuple[int, int]) -> None:
    variant = VARIANTS[name + suffix]
    assert (count_parameters(variant), count_parameters_without_dense_head(variant)) == counts


@pytest.mark.parametrize(("name", "billions"), MULTIPLY_ADDS.items())
def test_multiply_adds_equal_the_tables(name: str, billions: tuple[float, float, float]) -> None:
    counted = [multiply_adds(name, size) / 1e9 for size in (224, 384, 512)]
    assert counted == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_those_of_the_paper(name: str) -> None:
    published = PUBLISHED[name]
    if published.parameters is not None:
        number, unit = float(published.parameters[:-1]), {"M": 1e6, "B": 1e9}[published.parameters[-1]]
        assert count_parameters(VARIANTS[name]) == pytest.approx(number * unit, rel=0.01)
    for size, billions in published.multiply_adds.items():
        # The paper counts norms, softmax and look-ups as well.
        assert 0.96 * billions * 1e9 <= multiply_adds(name, size) <= billions * 1e9


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("coatnet_2_")])
def test_the_layouts_of_the_study_cost_about_as_much_as_coatnet_2(name: str) -> None:
    if not name.endswith("_dw"):
        assert multiply_adds(name, 224) == pytest.approx(multiply_adds("coatnet_2", 224), rel=0.04)


def test_larger_tables_and_other_classes_are_counted() -> None:
    heads, layers = (12, 24), (5, 2)
    grown = sum(
        h * n * (after**2 - before**2) for h, n, before, after in zip(heads, layers, (27, 13), (47, 23), strict=True)
    )
    assert count_parameters(VARIANTS["coatnet_0"], 384) == 25_036_948 + grown
    assert count_parameters(VARIANTS["coatnet_0"], num_classes=1001) == 25_036_948 + 769


def test_costs_of_parts_are_those_of_the_whole_model() -> None:
    """Against one count of the whole, and against what autograd keeps of a real forward on this machine."""
    variant = find_variant("coatnet_debug", **OPTIONS)
    costs = count_costs(variant, 64, num_classes=10)
    model = create_model("coatnet_debug", num_classes=10, image_size=64, **OPTIONS)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        # On the CPU its flash attention would run, which the counter does not know.
        create_model("coatnet_debug", num_classes=10, image_size=64, **OPTIONS).eval()(torch.randn(1, 64, 64, 3))
    assert sum(cost.multiply_adds for cost in costs) == counter.get_total_flops() // 2
    assert len(costs) == 1 + 9 + 1

    def kept(batch: int) -> list[int]:
        storages: dict[int, torch.Tensor] = {p.data_ptr(): p for p in model.parameters()}
        totals = []
        saved = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            if tensor.untyped_storage().data_ptr() not in storages:
                storages[tensor.untyped_storage().data_ptr()] = tensor
                saved += tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(batch, 64, 64, 3, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            for module in (model.stem, *model.blocks[:5]):
                saved = 0
                x = module(x)
                storages[x.data_ptr() + 1] = x
                totals.append(saved)
        return totals

    for parameter in model.train().parameters():
        parameter.data = parameter.data.bfloat16()
    # Of the convolutional blocks, whose kernels keep the same on every device.
    measured = [two - one for one, two in zip(kept(1), kept(2), strict=True)]
    assert measured == [cost.activation_bytes for cost in costs[:6]]


def test_training_costs_three_forwards_and_the_recomputation() -> None:
    variant = VARIANTS["coatnet_debug"]
    stem, *blocks, head = count_costs(variant, 64)
    plain = count_training_cost(variant, 64)
    assert plain.multiply_adds == 3 * multiply_adds("coatnet_debug", 64)
    assert plain.activation_bytes == sum(cost.activation_bytes for cost in (stem, *blocks, head))

    # Inputs of the stem and of the four blocks: cells times channels, of 2 bytes.
    inputs = [2 * cells * width for cells, width in ((64**2, 3), (32**2, 8), (16**2, 8), (8**2, 16), (4**2, 32))]
    whole = count_training_cost(variant, 64, policy="every_block")
    assert whole.multiply_adds == 4 * multiply_adds("coatnet_debug", 64) - head.multiply_adds
    largest = max(cost.activation_bytes for cost in (stem, *blocks))
    assert whole.activation_bytes == sum(inputs) + head.activation_bytes + largest

    convolutions = count_training_cost(variant, 64, policy="mbconv")
    again = (stem, *blocks[:2])
    assert convolutions.multiply_adds - plain.multiply_adds == sum(cost.multiply_adds for cost in again)
    rest = sum(cost.activation_bytes for cost in (*blocks[2:], head))
    assert convolutions.activation_bytes == sum(inputs[:3]) + rest + max(cost.activation_bytes for cost in again)
