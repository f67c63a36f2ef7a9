"""Activation checkpointing changes what is kept, and not one bit of what is computed."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from models.activation_checkpointing import recomputed_blocks
from models.coatnet import CoAtNet
from models.norm import recorded_statistics
from models.options import CheckpointingPolicy
from models.registry import create_model

POLICIES: list[CheckpointingPolicy] = ["every_block", "mbconv", 1, 2, 3]


def debug(policy: CheckpointingPolicy = "none", **options: Any) -> CoAtNet:
    model = create_model(
        "coatnet_debug", num_classes=3, image_size=32, drop_path_rate=0.5, depths=(2, 2, 3, 2), **options
    )
    model.set_grad_checkpointing(policy=policy)
    return model.train()


def step(model: CoAtNet, autocast: bool = False) -> dict[str, Tensor]:
    """Loss, gradients and recorded statistics of two micro-batches."""
    for number in range(2):
        torch.manual_seed(number)
        x = torch.randn(6, 32, 32, 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        # Outside, as an engine does it: what is computed again must find its way back into the context.
        loss = y.float().square().sum()
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    return {"loss": loss, "statistics": recorded_statistics(model), **gradients}


@cache
def plain_step(convolution_norm: str, autocast: bool) -> dict[str, Tensor]:
    return step(debug(convolution_norm=convolution_norm), autocast)


@pytest.mark.parametrize(
    ("convolution_norm", "autocast"),
    [("batch", False), ("layer", False), ("batch", True)],
    ids=["batch", "layer", "autocast"],
)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_and_statistics_equal_those_without_to_the_bit(
    policy: CheckpointingPolicy, convolution_norm: str, autocast: bool
) -> None:
    with_it = step(debug(policy, convolution_norm=convolution_norm), autocast)
    without = plain_step(convolution_norm, autocast)
    different = [name for name in without if not torch.equal(with_it[name], without[name])]
    assert different == []


def test_only_the_blocks_of_a_policy_run_twice() -> None:
    calls: dict[int, int] = {}
    model = debug("mbconv")
    for number, module in enumerate((model.stem, *model.blocks)):
        module.register_forward_pre_hook(lambda *_, n=number: calls.update({n: calls.get(n, 0) + 1}))
    model(torch.randn(2, 32, 32, 3)).sum().backward()
    # Stem and four MBConv blocks, then five Transformer blocks.
    assert [calls[number] for number in range(10)] == [2] * 5 + [1] * 5


def test_fewer_activations_are_stored() -> None:
    def kept(model: CoAtNet) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.randn(2, 32, 32, 3))
        return total

    none, mbconv, every = (kept(debug(policy)) for policy in ("none", "mbconv", "every_block"))
    assert every < mbconv / 5
    assert mbconv < none / 2


def test_nothing_is_recomputed_in_evaluation_or_when_switched_off() -> None:
    model = debug("every_block")
    model.set_grad_checkpointing(False)
    assert not any(model.recomputed)
    model.set_grad_checkpointing()
    assert all(model.recomputed)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(torch.randn(2, 32, 32, 3))).all()


def test_policies_name_their_blocks() -> None:
    convolves = [True, True, False, False, False]
    assert recomputed_blocks("mbconv", convolves) == convolves
    assert recomputed_blocks(2, convolves) == [True, False, True, False, True]
    assert recomputed_blocks("none", convolves) == [False] * 5
    for bad in ("all", 0, -1, True):
        with pytest.raises(ValueError, match="must be none, every_block, mbconv, or k"):
            recomputed_blocks(bad, convolves)  # type: ignore[arg-type]
