"""Initial weights: all of them, by seed and name."""

import pytest
import torch

from models.registry import create_model


@pytest.mark.parametrize(
    "options",
    [{}, {"convolution_norm": "layer"}, {"relative_attention": "none"}, {"head_hidden_layer": False}],
    ids=str,
)
@pytest.mark.parametrize("name", ["coatnet_debug", "coatnet_2_vit_rel"])
def test_initialization_reaches_every_parameter_and_buffer(name: str, options: dict[str, object]) -> None:
    size = {"widths": (32, 32), "depths": (1,)} if name == "coatnet_2_vit_rel" else {}
    model = create_model(name, num_classes=3, image_size=32, device="meta", **size, **options)  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor in tensors.values():
        tensor.data.fill_(float("nan"))
    model.initialize(0)
    assert [name for name, tensor in tensors.items() if tensor.isnan().any()] == []
    assert torch.isfinite(model(torch.randn(2, 32, 32, 3))).all()


def test_weights_have_the_variants_spread_and_the_rest_is_neutral() -> None:
    model = create_model("coatnet_0", image_size=64)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            # Five standard deviations of the estimate.
            assert abs(parameter.std().item() / 0.02 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
    nano = create_model("coatnet_nano")
    assert nano.get_parameter("head.hidden.weight").std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_the_same_seed_gives_the_same_weights_and_no_two_parameters_share_them() -> None:
    first, second, other = (create_model("coatnet_debug", num_classes=3, image_size=32, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    classifiers = [model.get_parameter("head.classifier.weight") for model in (first, other)]
    assert not torch.equal(*classifiers)
    a, b = (first.get_parameter(f"blocks.{number}.feed_forward.expand.weight") for number in (2, 3))
    assert a.shape == b.shape
    assert not torch.equal(a, b)


def test_each_process_can_fill_its_share() -> None:
    whole = create_model("coatnet_debug", num_classes=3, image_size=32, seed=7)
    names = [name for name, _ in whole.named_parameters()]
    shares = names[::2], names[1::2]
    parts = [create_model("coatnet_debug", num_classes=3, image_size=32, seed=1) for _ in shares]
    for share, part in zip(shares, parts, strict=True):
        part.initialize(7, only=set(share))
        for name in share:
            assert torch.equal(part.get_parameter(name), whole.get_parameter(name))
        untouched = next(name for name in names if name not in share and name.endswith("expand.weight"))
        assert not torch.equal(part.get_parameter(untouched), whole.get_parameter(untouched))


def test_a_model_is_made_where_it_is_asked_for() -> None:
    model = create_model("coatnet_7", device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with torch.device("meta"):
        assert create_model("coatnet_debug").head.classifier.weight.is_meta
    assert create_model("coatnet_debug").head.classifier.weight.device.type == "cpu"
