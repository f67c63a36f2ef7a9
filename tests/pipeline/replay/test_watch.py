"""Modules are watched in order of computation, each once, and no gradient stays."""

import torch

from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.replay.watch import Watch


def watched(model: CoAtNet, watch: Watch, *modules: str) -> None:
    with watch.over({name: model.get_submodule(name) for name in modules}, dict(model.named_parameters())):
        watch.backward(model(torch.ones(2, 32, 32, 3)).square().mean())


def test_a_block_that_is_recomputed_is_seen_once() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32).train()
    model.set_grad_checkpointing(policy="every_block")
    watch = Watch(torch.sum)
    watched(model, watch, "stem", "blocks.0", "blocks.0.depthwise", "head")
    parameters = dict(model.named_parameters())
    seen = [(one.name, one.kind) for one in watch.seen if one.name not in parameters]
    forward = ["stem", "blocks.0.depthwise", "blocks.0", "head"]
    backward = ["head", "blocks.0", "blocks.0.depthwise", "stem"]
    assert seen == [(name, "output") for name in forward] + [(name, "gradient") for name in backward]
    assert sorted(one.name for one in watch.seen if one.name in parameters) == sorted(parameters)


def test_gradients_of_parameters_are_freed_one_by_one() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32).train()

    def held(_: torch.Tensor) -> torch.Tensor:
        return torch.tensor(sum(parameter.grad is not None for parameter in model.parameters()))

    watch = Watch(held)
    watched(model, watch, "stem", "head")
    assert {int(one.measure) for one in watch.seen} == {0}


def test_a_model_is_not_watched_any_longer_than_that() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32).train()
    watch = Watch(torch.sum)
    watched(model, watch, "stem")
    seen = len(watch.seen)
    model(torch.ones(2, 32, 32, 3)).square().mean().backward()
    assert len(watch.seen) == seen
    assert all(parameter.grad is not None for parameter in model.parameters())
