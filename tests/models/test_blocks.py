"""MBConv, BatchNorm and stochastic depth."""

import torch
from torch.nn import functional as F

from models.attention import TransformerBlock
from models.drop import add_branch_of_kept_samples, drop_samples
from models.mbconv import MBConv
from models.norm import BatchNorm, move_running_statistics, recorded_statistics


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


def test_batch_norm_statistics_stay_float32_with_bfloat16_activations() -> None:
    norm = BatchNorm(4)
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    y = norm(torch.randn(4, 3, 3, 4).bfloat16())
    assert y.dtype == torch.bfloat16
    assert recorded_statistics(norm).dtype == torch.float32
    norm.eval()
    assert norm(torch.randn(4, 3, 3, 4).bfloat16()).dtype == torch.bfloat16


def test_mbconv_equals_plain_convolutions() -> None:
    """The block as the paper writes it, with strided 1x1 convolutions on (B, C, H, W)."""
    torch.manual_seed(0)
    block = MBConv(6, 8, stride=2, drop_rate=0.0, momentum=0.01).double().eval()
    x = torch.randn(2, 8, 8, 6, dtype=torch.float64)

    def norm(layer: BatchNorm, t: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(t, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-3)

    def conv1x1(layer: torch.nn.Linear, t: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(t, layer.weight[:, :, None, None], layer.bias, stride=stride)

    nchw = x.permute(0, 3, 1, 2)
    y = norm(block.norm, nchw)
    y = F.gelu(norm(block.expand_norm, conv1x1(block.expand, y, stride=2)), approximate="tanh")
    y = F.gelu(norm(block.depthwise_norm, block.depthwise(y)), approximate="tanh")
    gate = F.adaptive_avg_pool2d(y, 1)
    gate = conv1x1(block.squeeze_excitation.excite, F.silu(conv1x1(block.squeeze_excitation.squeeze, gate)))
    y = conv1x1(block.shrink, y * gate.sigmoid())
    expected = conv1x1(block.shortcut, F.max_pool2d(nchw, 2)) + y
    torch.testing.assert_close(block(x), expected.permute(0, 2, 3, 1))


def test_stochastic_depth_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    shortcut, x = torch.zeros(4000, 1), torch.ones(4000, 1)
    for dropped in (add_branch_of_kept_samples(shortcut, x, lambda t: t, 0.4), drop_samples(x, 0.4)):
        assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
        # Four standard deviations of the mean of 4000 draws.
        assert abs(dropped.mean().item() - 1.0) < 4 * (0.4 / 0.6 / 4000) ** 0.5


def test_a_transformer_block_drops_whole_samples_per_branch_and_runs_when_none_is_kept() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, 8, head_size=8, grid=(2, 2), stride=1, drop_rate=0.999).train()
    x = torch.randn(3, 2, 2, 8)
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_stochastic_depth_follows_from_the_seed() -> None:
    block = TransformerBlock(8, 8, head_size=8, grid=(2, 2), stride=1, drop_rate=0.5).train()
    x = torch.randn(16, 2, 2, 8)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(block(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
