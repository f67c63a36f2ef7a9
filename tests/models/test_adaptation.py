"""Trained weights in a model for another image size, other classes, or of another kind."""

import pytest
import torch

from models.adaptation import adapt_parameters
from models.coatnet import CoAtNet
from models.registry import create_model


def debug(num_classes: int = 3, image_size: int = 32, seed: int = 0, name: str = "coatnet_debug") -> CoAtNet:
    return create_model(name, num_classes=num_classes, image_size=image_size, seed=seed)


def parameters(model: CoAtNet) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_for_a_larger_size_only_resize_the_relative_tables() -> None:
    small, large = debug(seed=1), debug(image_size=64, seed=2)
    source = parameters(small)
    fitted = adapt_parameters(source, large)
    changed = {name for name in fitted if fitted[name].shape != source[name].shape}
    assert changed == {name for name in source if name.endswith("relative_bias.table")}
    assert all(torch.equal(fitted[name], source[name]) for name in fitted.keys() - changed)


@pytest.mark.parametrize("size", [64, 96])
def test_resizing_at_load_time_equals_resizing_on_the_fly(size: int) -> None:
    small, large = debug(seed=1).eval(), debug(image_size=size, seed=2).eval()
    large.load_state_dict(adapt_parameters(parameters(small), large), strict=False)
    x = torch.randn(2, size, size, 3)
    with torch.no_grad():
        assert torch.equal(small(x), large(x))


def test_a_classifier_for_other_classes_keeps_its_initialization() -> None:
    model = debug(num_classes=5)
    fitted = adapt_parameters(parameters(debug()), model)
    assert parameters(model).keys() - fitted.keys() == {"head.classifier.weight", "head.classifier.bias"}


def test_weights_of_other_widths_are_refused_with_the_tensor_and_both_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"stem\.conv1\.weight is \(32, 3, 3, 3\) in the checkpoint and \(8, 3, 3, 3\)"
    ):
        adapt_parameters(parameters(debug(name="coatnet_nano")), debug())


def test_weights_of_other_depths_or_options_are_refused_by_name() -> None:
    deeper = create_model("coatnet_debug", num_classes=3, image_size=32, depths=(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"the checkpoint lacks blocks\.4\.attention\.out\.bias and 12 more"):
        adapt_parameters(parameters(debug()), deeper)
    with pytest.raises(ValueError, match=r"has blocks\.4\.attention\.out\.bias and 12 more that this model does not"):
        adapt_parameters(parameters(deeper), debug())
    headless = create_model("coatnet_debug", num_classes=3, image_size=32, head_hidden_layer=False)
    with pytest.raises(ValueError, match=r"has head\.hidden\.bias and 1 more"):
        adapt_parameters(parameters(debug()), headless)
