"""CoAtNet as a whole: sizes, shapes, initialization, decay, weights for another size."""

import pytest
import torch

from models.coatnet import adapt_parameters
from models.registry import create_model

# Counts that the paper's tables and published sizes imply: 1000 classes, tables for 224 pixels.
PARAMETERS = {
    "coatnet_0": 25_036_948,
    "coatnet_1": 42_225_904,
    "coatnet_2": 74_685_000,
    "coatnet_3": 166_966_648,
    "coatnet_4": 275_425_672,
    "coatnet_5": 687_053_336,
    "coatnet_6": 1_471_125_616,
    "coatnet_7": 2_441_973_112,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_published_variants_have_their_parameters_to_the_unit(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (32, 64)])
def test_every_parameter_takes_part_in_the_gradient(size: tuple[int, int]) -> None:
    model = create_model("coatnet_debug", num_classes=7, image_size=size)
    logits = model(torch.randn(3, *size, 3))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_initialization_reaches_every_parameter() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.initialize(torch.Generator().manual_seed(0))
    assert not any(p.isnan().any() for p in model.parameters())


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (create_model("coatnet_debug", num_classes=3, image_size=32, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.classifier.weight, other.head.classifier.weight)


def test_weight_decay_spares_biases_norms_and_relative_tables() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32)
    spared = model.no_weight_decay()
    assert {"stem.norm.weight", "stem.conv1.bias", "head.norm.weight"} <= spared
    assert {"blocks.2.attention.relative_bias.table", "blocks.2.attention_norm.weight"} <= spared
    decayed = {name for name, _ in model.named_parameters()} - spared
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert "blocks.0.expand.weight" in decayed


def test_weights_for_a_larger_size_only_resize_the_relative_tables() -> None:
    small = create_model("coatnet_debug", num_classes=3, image_size=32, seed=1)
    large = create_model("coatnet_debug", num_classes=3, image_size=64, seed=2)
    source = dict(small.named_parameters())
    fitted = adapt_parameters({name: p.detach() for name, p in source.items()}, large)
    large.load_state_dict(fitted, strict=False)
    changed = {name for name in fitted if fitted[name].shape != source[name].shape}
    assert changed == {name for name in source if name.endswith("relative_bias.table")}
    assert all(torch.equal(fitted[name], source[name]) for name in fitted.keys() - changed)


def test_a_classifier_for_other_classes_keeps_its_initialization() -> None:
    trained = create_model("coatnet_debug", num_classes=3, image_size=32)
    model = create_model("coatnet_debug", num_classes=5, image_size=32)
    fitted = adapt_parameters(dict(trained.named_parameters()), model)
    assert dict(model.named_parameters()).keys() - fitted.keys() == {"head.classifier.weight", "head.classifier.bias"}


def test_weights_of_another_model_are_refused_by_name() -> None:
    nano = create_model("coatnet_nano", num_classes=3, image_size=32)
    debug = create_model("coatnet_debug", num_classes=3, image_size=32)
    with pytest.raises(ValueError, match=r"another model's: the checkpoint lacks blocks\.\d.*, and has blocks\.\d"):
        adapt_parameters(dict(nano.named_parameters()), debug)
    parameters = dict(debug.named_parameters()) | {"stem.conv2.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"stem\.conv2\.weight is \(2, 2\) in the checkpoint"):
        adapt_parameters(parameters, debug)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean coatnet_nano"):
        create_model("coatnet_nan", num_classes=3)
    with pytest.raises(ValueError, match="image size 40 x 32: each side must be a multiple of 16"):
        create_model("coatnet_debug", num_classes=3, image_size=(40, 32))
    with pytest.raises(ValueError, match=r"drop_path_rate 1\.0"):
        create_model("coatnet_debug", num_classes=3, image_size=32, drop_path_rate=1.0)
