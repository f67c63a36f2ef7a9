"""Checksums of a micro-batch: one for each block, taken from gradients that need not be kept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.coatnet import CoAtNet
from models.norm import discard_recorded_statistics
from models.registry import create_model
from pipeline.cross_check.checksums import Checksums, kind_of


@pytest.fixture
def model() -> CoAtNet:
    return create_model("coatnet_debug", num_classes=3, image_size=(32, 32)).train()


@pytest.fixture
def checksums(model: CoAtNet) -> Checksums:
    """Of the model in an engine that does nothing."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    engine: Any = SimpleNamespace(module=model, parameters=SimpleNamespace(shapes=shapes))
    return Checksums(engine, torch.device("cpu"))


def loss_of(model: CoAtNet) -> Tensor:
    discard_recorded_statistics(model)
    images = torch.linspace(-1, 1, 2 * 32 * 32 * 3).sin().view(2, 32, 32, 3)
    return model(images).square().mean()  # type: ignore[no-any-return]


def test_there_is_one_for_the_loss_each_block_and_the_statistics(checksums: Checksums) -> None:
    blocks = ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head")
    assert checksums.names == ("loss", *(f"gradient of {block}" for block in blocks), "BatchNorm statistics")
    assert [kind_of(name) for name in checksums.names] == ["loss", *6 * ["gradient"], "statistics"]


def test_gradients_are_seen_by_every_backward_and_freed_where_nobody_needs_them(
    model: CoAtNet, checksums: Checksums
) -> None:
    loss = loss_of(model)
    seen = checksums.of_forward(loss.detach())
    assert not seen[1:-1].any()
    with checksums.add_gradients(seen):
        loss.backward()  # type: ignore[no-untyped-call]
    assert (seen != 0).all()

    loss = loss_of(model)
    aside = checksums.of_forward(loss.detach())
    with checksums.add_gradients(aside, freed=True):
        gradients = torch.autograd.grad(loss, checksums.parameters)
    assert torch.equal(aside, seen)
    assert all(gradient.untyped_storage().nbytes() == 4 for gradient in gradients)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in checksums.parameters[-2:])

    before = seen.clone()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(seen, before)


@pytest.mark.parametrize("name", ["stem.conv1.weight", "blocks.1.shortcut.bias", "head.classifier.bias"])
def test_one_bit_of_a_gradient_changes_the_value_of_its_block_alone(
    model: CoAtNet, checksums: Checksums, name: str
) -> None:
    def values() -> Tensor:
        loss = loss_of(model)
        found = checksums.of_forward(loss.detach())
        with checksums.add_gradients(found, freed=True):
            torch.autograd.grad(loss, checksums.parameters)
        return found

    def flip(gradient: Tensor) -> Tensor:
        wrong = gradient.clone(memory_format=torch.contiguous_format)
        wrong.view(-1).view(torch.uint8)[-4] ^= 1
        return wrong

    right = values()
    dict(model.named_parameters())[name].register_hook(flip)  # type: ignore[no-untyped-call]
    differing = [checksums.names[place] for place in (values() != right).nonzero().flatten().tolist()]
    assert differing == [f"gradient of {'.'.join(name.split('.')[: 2 if name.startswith('blocks') else 1])}"]
