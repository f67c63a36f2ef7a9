"""MBConv, BatchNorm and stochastic depth."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.attention import TransformerBlock
from models.drop import Kept, draw_kept
from models.mbconv import MBConv
from models.norm import (
    BatchNorm,
    discard_recorded_statistics,
    move_running_statistics,
    recorded_statistics,
    recording_paused,
)
from models.variants import VARIANTS

DEBUG = VARIANTS["coatnet_debug"]


def test_batch_norm_equals_torchs_in_training_and_evaluation() -> None:
    torch.manual_seed(0)
    ours, plain = BatchNorm(5, momentum=0.1), torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.1)
    x = torch.randn(4, 6, 6, 5) * 3 + 1
    y = ours(x)
    expected = plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, expected)
    move_running_statistics(ours, recorded_statistics(ours))
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    ours.eval(), plain.eval()
    torch.testing.assert_close(ours(x), plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_running_statistics_move_once_by_the_mean_over_micro_batches() -> None:
    norm = BatchNorm(3, momentum=0.5)
    first, second = torch.randn(8, 2, 2, 3), torch.randn(8, 2, 2, 3)
    norm(first), norm(second)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    move_running_statistics(norm, recorded_statistics(norm) / 2)
    mean = (first.mean(dim=(0, 1, 2)) + second.mean(dim=(0, 1, 2))) / 2
    torch.testing.assert_close(norm.running_mean, mean / 2)
    assert torch.equal(recorded_statistics(norm), torch.zeros(6))


@pytest.mark.parametrize("autocast", [False, True])
def test_batch_norm_statistics_are_float32_with_bfloat16_activations(autocast: bool) -> None:
    """Against double precision: summed in bfloat16, a mean far from zero would be off by a percent."""
    torch.manual_seed(0)
    norm = BatchNorm(4)
    if not autocast:
        norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    x = (torch.randn(8, 16, 16, 4) + 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert norm(x).dtype == torch.bfloat16
        recorded = recorded_statistics(norm)
        assert norm.eval()(x).dtype == torch.bfloat16
    assert recorded.dtype == torch.float32
    flat = x.double().view(-1, 4)
    torch.testing.assert_close(recorded, torch.cat([flat.mean(0), flat.var(0)]).float(), rtol=1e-4, atol=0)


def test_statistics_of_a_step_that_is_not_applied_are_discarded() -> None:
    norm = BatchNorm(3)
    norm(torch.full((2, 2, 2, 3), float("nan")))
    discard_recorded_statistics(norm)
    assert torch.equal(recorded_statistics(norm), torch.zeros(6))
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_paused_recording_leaves_the_record_alone() -> None:
    norm = BatchNorm(3)
    norm(torch.randn(8, 2, 2, 3))
    before = recorded_statistics(norm)
    with recording_paused(norm):
        norm(torch.randn(8, 2, 2, 3))
    assert torch.equal(recorded_statistics(norm), before)
    norm(torch.randn(8, 2, 2, 3))
    assert not torch.equal(recorded_statistics(norm), before)


@pytest.mark.parametrize(
    "options", [{}, {"stride_in": "depthwise"}, {"pool": "average"}, {"convolution_norm": "layer"}], ids=str
)
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_mbconv_equals_plain_convolutions(stride: int, side: int, options: dict[str, Any]) -> None:
    """The block as the paper writes it, with 1x1 convolutions on (B, C, H, W); fewer cells than channels, and more."""
    torch.manual_seed(0)
    block = MBConv(6, 8, stride=stride, variant=replace(DEBUG, **options)).double().eval()
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        torch.nn.init.normal_(tensor) if "var" not in name else torch.nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, side, side, 6, dtype=torch.float64)

    def norm(layer: Any, t: torch.Tensor) -> torch.Tensor:
        if options.get("convolution_norm") == "layer":
            return F.layer_norm(t.permute(0, 2, 3, 1), t.shape[1:2], layer.weight, layer.bias, 1e-5).permute(0, 3, 1, 2)
        return F.batch_norm(t, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-3)

    def conv1x1(layer: torch.nn.Module, t: torch.Tensor, stride: int = 1) -> torch.Tensor:
        assert isinstance(layer, torch.nn.Linear)
        return F.conv2d(t, layer.weight[:, :, None, None], layer.bias, stride=stride)

    first, second = (1, stride) if options.get("stride_in") == "depthwise" else (stride, 1)
    nchw = x.permute(0, 3, 1, 2)
    y = norm(block.norm, nchw)
    y = F.gelu(norm(block.expand_norm, conv1x1(block.expand, y, stride=first)), approximate="tanh")
    y = F.conv2d(y, block.depthwise.weight, stride=second, padding=1, groups=32)
    y = F.gelu(norm(block.depthwise_norm, y), approximate="tanh")
    gate = F.adaptive_avg_pool2d(y, 1)
    gate = conv1x1(block.squeeze_excitation.excite, F.silu(conv1x1(block.squeeze_excitation.squeeze, gate)))
    y = conv1x1(block.shrink, y * gate.sigmoid())
    if stride == 2:
        nchw = F.avg_pool2d(nchw, 2) if options.get("pool") == "average" else F.max_pool2d(nchw, 2)
    expected = conv1x1(block.shortcut, nchw) + y
    torch.testing.assert_close(block(x), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("stride", [1, 2])
def test_mbconv_passes_the_numeric_gradient_check(stride: int) -> None:
    torch.manual_seed(0)
    block = MBConv(2, 4, stride=stride, variant=DEBUG).double().train()
    x = torch.randn(3, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(block.named_parameters())
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), x)
        return y

    # No two inputs of a maximum may be within the check's step of each other.
    assert torch.autograd.gradcheck(forward, (x, *parameters.values()), eps=1e-7, atol=1e-5)


def kept(*samples: int, scale: float = 1.0, batch: int = 3) -> Kept:
    places = torch.full((batch,), len(samples))
    places[list(samples)] = torch.arange(len(samples))
    factors = torch.where(places < len(samples), scale, 0.0)
    return Kept(torch.tensor(samples), places, torch.tensor(scale), factors)


def test_draws_keep_the_expectation() -> None:
    torch.manual_seed(0)
    (draw,) = draw_kept([0.4], 4000, torch.device("cpu"))
    y = draw.add(torch.zeros(4000, 1), draw.of(torch.ones(4000, 1)))
    assert set(y.flatten().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    # Four standard deviations of the mean of 4000 draws.
    assert abs(y.mean().item() - 1.0) < 4 * (0.4 / 0.6 / 4000) ** 0.5


def test_draws_depend_on_the_seed_and_differ_between_branches() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([draw.samples.tolist() for draw in draw_kept([0.5, 0.5], 64, torch.device("cpu"))])
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]


def test_a_draw_that_keeps_no_sample_computes_one_with_scale_zero() -> None:
    """On one rank alone, a branch that is not run would hang the others."""
    (draw,) = draw_kept([1 - 1e-12], 3, torch.device("cpu"))
    assert draw.samples.tolist() == [0]
    assert torch.equal(draw.add(torch.ones(3, 1), draw.of(torch.ones(3, 1))), torch.ones(3, 1))


def test_a_transformer_block_computes_only_the_kept_samples_of_each_branch() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 16, stride=1, grid=(2, 2), variant=DEBUG)
    x = torch.randn(3, 2, 2, 16)
    rows = []
    block.attention.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    block.feed_forward.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    y = block(x, (kept(0, 2, scale=2.0), kept(1)))
    assert rows == [2, 1]
    attended = x + 2.0 * torch.stack([block._attend(x)[0], torch.zeros(2, 2, 16), block._attend(x)[2]])
    expected = attended.clone()
    expected[1] += block._feed_forward(attended)[1]
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_an_mbconv_block_drops_samples_and_counts_all_of_them_in_its_statistics() -> None:
    torch.manual_seed(0)
    block, whole = (MBConv(4, 4, stride=1, variant=DEBUG) for _ in range(2))
    whole.load_state_dict(block.state_dict())
    x = torch.randn(3, 4, 4, 4)
    y, everything = block(x, (kept(1, scale=2.0),)), whole(x)
    assert torch.equal(y[0], x[0])
    torch.testing.assert_close(y[1] - x[1], 2 * (everything[1] - x[1]))
    assert torch.equal(recorded_statistics(block), recorded_statistics(whole))
