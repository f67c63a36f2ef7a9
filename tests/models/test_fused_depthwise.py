"""The fused middle of MBConv in plain torch, and a model that uses it: the same as the plain way, with less stored."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from models.activation_checkpointing import recompute_in_backward
from models.coatnet import CoAtNet
from models.fused_depthwise import fused_depthwise
from models.mbconv import MBConv
from models.norm import BatchNorm, discard_recorded_statistics, recorded_statistics, recording_paused
from models.options import CheckpointingPolicy, Gelu
from models.registry import create_model
from models.variants import VARIANTS, find_variant
from tests.models.plain_and_fused import plain_and_fused
from tests.support.operators import Recorded

DEBUG = VARIANTS["coatnet_debug"]
CPU = torch.device("cpu")


def difference(ours: Tensor, other: Tensor) -> float:
    """The greatest one, as a share of the greatest value."""
    return float((ours.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4 * 2**-8)], ids=str)
def test_both_ways_give_the_same_values_gradients_and_statistics(
    dtype: torch.dtype, tolerance: float, stride: int, gelu: Gelu
) -> None:
    """In bfloat16, the fused way gives what float32 does up to four roundings of 2^-8 each: of the convolution's output,
    of the gradients there and behind the first GELU, and of what is returned.

    The plain way in bfloat16 is no measure: its convolutions are oneDNN's, whose gradients of weights are up to 2.4 % off
    on some CPUs and 3.8 % on those with instructions for bfloat16.
    """
    options: dict[str, Any] = {"stride": stride, "device": CPU, "variant": replace(DEBUG, gelu=gelu)}
    plain, fused = plain_and_fused((3, 7, 9, 24), dtype=dtype, **options)
    exact, _ = plain_and_fused((3, 7, 9, 24), dtype=torch.float32, values=dtype, **options)
    for ours, alike, expected in zip(fused(), plain(), exact(), strict=True):
        assert ours.dtype == alike.dtype
        assert ours.shape == alike.shape
        assert difference(ours, expected) < tolerance


@pytest.mark.parametrize("stride", [1, 2])
def test_in_bfloat16_it_rounds_less_than_the_plain_way(stride: int) -> None:
    def ways(dtype: torch.dtype) -> list[list[Tensor]]:
        both = plain_and_fused((4, 8, 8, 32), stride=stride, dtype=dtype, device=CPU, variant=DEBUG)
        return [way() for way in both]

    (exact, _), (plain, fused) = ways(torch.float32), ways(torch.bfloat16)
    # Result, gradients of input, convolution and norms; the statistics differ by the rounding of the same values.
    errors = [[difference(ours, true) for ours, true in zip(way, exact, strict=True)] for way in (fused, plain)]
    assert sum(errors[0]) < sum(errors[1])


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("stride", [1, 2])
def test_it_passes_the_numeric_gradient_check(stride: int, gelu: Gelu) -> None:
    torch.manual_seed(0)
    variant = replace(DEBUG, gelu=gelu, stride_in="depthwise", pool="average")
    block = MBConv(1, 1, stride=stride, variant=variant).double().train()
    block.fused = True
    x = torch.randn(2, 4, 4, 1, dtype=torch.float64, requires_grad=True)
    parameters = dict(block.named_parameters())
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), x)
        return y

    assert torch.autograd.gradcheck(forward, (x, *parameters.values()), eps=1e-6, atol=1e-6)


def test_one_value_per_channel_is_refused() -> None:
    norm = BatchNorm(4)
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 4\): BatchNorm needs more than one value per channel"):
        fused_depthwise(torch.ones(1, 2, 2, 4), norm, torch.ones(4, 1, 3, 3), norm, stride=2, gelu="tanh")
    assert not norm.recorded.any()


def models(**options: Any) -> tuple[CoAtNet, CoAtNet]:
    """Two equal models, the second with the fused convolution."""
    plain, fused = (
        create_model("coatnet_debug", num_classes=3, image_size=32, drop_path_rate=0.3, depths=(2, 2, 1, 1), **options)
        for _ in range(2)
    )
    fused.set_fused_depthwise()
    return plain, fused


def outcome(model: CoAtNet) -> list[Tensor]:
    torch.manual_seed(0)
    y = model(torch.randn(8, 32, 32, 3, dtype=model.head.norm.weight.dtype))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters())), recorded_statistics(model)]


def computed(model: CoAtNet) -> int:
    """How many convolutions of a training forward are fused."""
    with Recorded() as recorded:
        model(torch.randn(2, 32, 32, 3, dtype=model.head.norm.weight.dtype))
    count: int = recorded.counts["fused_depthwise"]
    return count


@pytest.mark.parametrize("stride_in", ["expansion", "depthwise"])
def test_a_model_trains_as_without_it_up_to_rounding(stride_in: str) -> None:
    plain, fused = models(stride_in=stride_in)
    assert (computed(plain), computed(fused)) == (0, 4)
    for model in (plain, fused):
        discard_recorded_statistics(model.double())
    for ours, expected in zip(outcome(fused), outcome(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    fused.set_fused_depthwise(False)
    assert computed(fused) == 0


@pytest.mark.parametrize("policy", ["every_block", "mbconv", 2])
def test_recomputation_changes_no_bit_and_records_once(policy: CheckpointingPolicy) -> None:
    _, stored = models()
    _, recomputed = models()
    recomputed.set_grad_checkpointing(policy=policy)
    for ours, expected in zip(outcome(recomputed), outcome(stored), strict=True):
        assert torch.equal(ours, expected)


def test_recording_pauses_as_in_the_plain_way() -> None:
    _, model = models()
    with recording_paused(model):
        model(torch.randn(2, 32, 32, 3))
    assert not recorded_statistics(model).any()
    model(torch.randn(2, 32, 32, 3))
    assert not recorded_statistics(model).requires_grad
    assert recorded_statistics(model).all()


def test_evaluation_is_that_of_the_plain_way() -> None:
    plain, fused = models()
    x = torch.randn(2, 32, 32, 3)
    assert torch.equal(fused.eval()(x), plain.eval()(x))
    assert computed(fused) == 0


@pytest.mark.parametrize(
    ("name", "options"), [("coatnet_debug", {"convolution_norm": "layer"}), ("coatnet_2_vit_rel", {})]
)
def test_a_model_without_such_blocks_is_refused(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = CoAtNet(find_variant(name, **options), num_classes=3, image_size=(32, 32))
    with pytest.raises(ValueError, match="needs MBConv blocks with BatchNorm, and this model has none"):
        model.set_fused_depthwise()
    model.set_fused_depthwise(False)


def test_three_wide_tensors_are_stored_in_place_of_six() -> None:
    counts = []
    for fused in (False, True):
        block = MBConv(8, 8, stride=1, variant=DEBUG)
        block.fused = fused
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = torch.randn(4, 8, 8, 8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x)
        counts.append(sum(size == 4 * 8 * 8 * 32 for size in sizes.values()))
    assert counts == [6, 3]


PASSES = {
    "native_batch_norm": 3, "native_batch_norm_backward": 5, "convolution_backward": 4, "div": 1,
    "fused_depthwise": 5, "fused_depthwise_backward": 11,
}  # fmt: skip
"""Of operators that read an argument twice: norms, for statistics and values; gradients of images and weights. `div`
reads one number of each channel. Of the fused ones, `test_kernels.py` counts them."""


def test_it_halves_the_passes_over_wide_tensors() -> None:
    """Reads and writes of a training step of MBConv at stride 1, as docs/gpus.md has them."""
    counts = []
    for fused in (False, True):
        block = MBConv(8, 8, stride=1, variant=DEBUG)
        block.fused = fused
        x = torch.randn(2, 16, 16, 8, requires_grad=True)
        with Recorded(size=2 * 16 * 16 * 32) as recorded:
            y = block(x)
            y.backward(torch.ones_like(y))
        counts.append(sum(PASSES.get(name, read + written) for name, read, written in recorded.of_size))
    assert counts == [43, 22]


@pytest.mark.slow(seconds=5)
def test_a_compiled_block_is_one_graph_and_trains_as_the_eager_one_with_and_without_recomputation() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(4, 8, 8, 8, requires_grad=True)
    eager, compiled = (MBConv(8, 8, stride=1, variant=DEBUG) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True, dynamic=False)
    for block in (eager, compiled):
        block.fused = True
    for recomputed, graphs in ((False, 1), (True, 2)):  # a block that records nothing is another graph
        results = []
        for block in (eager, compiled):
            y = recompute_in_backward(block, x) if recomputed else block(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
            results.append([y.detach(), *gradients, recorded_statistics(block)])
            discard_recorded_statistics(block)
        assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))
        assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_autocast_rounds_nothing_inside() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 4, 8).bfloat16(), torch.randn(8, 1, 3, 3)
    results = []
    for enabled in (False, True):
        norms = BatchNorm(8), BatchNorm(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, pooled = fused_depthwise(x, norms[0], weight, norms[1], stride=1, gelu="tanh")
        results.append([out, pooled, norms[1].recorded])
    assert all(torch.equal(under, without) for without, under in zip(*results, strict=True))
