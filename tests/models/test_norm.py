"""Which operators BatchNorm runs."""

from collections import Counter

import pytest
import torch
from torch import nn

from models.norm import (
    BatchNorm,
    batch_norms,
    discard_recorded_statistics,
    move_running_statistics,
    recorded_statistics,
)
from tests.support.operators import Recorded

VIEWS = ("permute", "unbind", "detach", "select", "expand", "split_with_sizes")


def operators(recorded: Recorded) -> Counter[str]:
    return Counter({name: count for name, count in recorded.counts.items() if name not in VIEWS})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_one_kernel_normalizes_and_no_activation_is_cast(precision: str) -> None:
    torch.manual_seed(0)
    norm = BatchNorm(8)
    if precision == "bf16":
        norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    x = torch.randn(4, 6, 6, 8, dtype=torch.float32 if precision == "fp32" else torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
        with Recorded() as forward:
            y = norm(x)
        assert y.dtype == x.dtype
    upstream = torch.randn_like(y)
    with Recorded() as backward:
        y.backward(upstream)
    # Weight and bias, one number a channel, are cast where they are bf16.
    wide, narrow = ((8,), torch.bfloat16, torch.float32), ((8,), torch.float32, torch.bfloat16)
    assert forward.casts == [wide] * 2 * (precision == "bf16")
    assert backward.casts == [narrow] * 2 * (precision == "bf16")
    del forward.counts["_to_copy"], backward.counts["_to_copy"], forward.counts["empty"]
    assert operators(forward) == {"zeros_like": 1, "native_batch_norm": 1, "add_": 1}
    assert operators(backward) == {"native_batch_norm_backward": 1}
    assert norm.recorded.dtype == torch.float32


def test_the_operators_of_a_movement_do_not_depend_on_the_number_of_layers() -> None:
    counts = []
    for layers in (2, 20):
        model = nn.Sequential(*(BatchNorm(3) for _ in range(layers)))
        with Recorded() as recorded:
            move_running_statistics(model, recorded_statistics(model))
            discard_recorded_statistics(model)
        counts.append(operators(recorded))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 4


def test_layers_move_by_their_own_momentum_to_their_own_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BatchNorm(3, momentum=0.5), BatchNorm(3, momentum=0.25))
    model(torch.randn(4, 2, 2, 3) + 7)
    records = [norm.recorded.clone() for norm in batch_norms(model)]
    move_running_statistics(model, recorded_statistics(model))
    for norm, (mean, variance) in zip(batch_norms(model), records, strict=True):
        assert torch.equal(norm.running_mean, torch.zeros(3).lerp(mean, norm.momentum))
        assert torch.equal(norm.running_var, torch.ones(3).lerp(variance, norm.momentum))
        assert not norm.recorded.any()


def test_a_step_that_is_not_finite_leaves_nothing_in_later_statistics() -> None:
    norm = BatchNorm(3)
    norm(torch.full((2, 2, 2, 3), float("nan")))
    discard_recorded_statistics(norm)
    norm(torch.ones(2, 2, 2, 3))
    assert torch.equal(recorded_statistics(norm), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
