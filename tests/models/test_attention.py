"""Relative attention: every form and every kernel against the formula, forward and backward."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import ATTENTION_BACKENDS, RelativeAttention, TransformerBlock
from models.options import BiasPlace
from models.registry import create_model
from models.relative_bias import expand_relative_bias, resize_relative_bias
from models.variants import VARIANTS

DEBUG = replace(VARIANTS["coatnet_debug"], head_size=8)
GRID = (3, 4)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def formula(attention: RelativeAttention, x: Tensor, form: BiasPlace, grid: tuple[int, int]) -> Tensor:
    """The paper's equations, written out."""
    batch, heads, tokens = x.shape[0], attention.heads, grid[0] * grid[1]
    q, k, v = (
        t.reshape(batch, tokens, heads, 8).transpose(1, 2)
        for t in attention.qkv(x).reshape(batch, tokens, -1).chunk(3, dim=-1)
    )
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    if form == "none":
        weights = scores.softmax(-1)
    else:
        bias = expand_relative_bias(resize_relative_bias(attention.relative_bias.table, grid), grid)
        weights = (scores + bias).softmax(-1) if form == "pre_normalization" else scores.softmax(-1) + bias
    y: Tensor = attention.out((weights @ v).transpose(1, 2).reshape(batch, *grid, 16))
    return y


@pytest.mark.parametrize("form", ["pre_normalization", "post_normalization", "none"])
@pytest.mark.parametrize("grid", [GRID, (5, 2)], ids=["trained-size", "other-size"])
def test_attention_equals_the_formula_with_its_gradients(form: BiasPlace, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(12, 16, grid=GRID, variant=replace(DEBUG, relative_attention=form)).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)
    ours, plain = attention(x), formula(attention, x, form, grid)
    torch.testing.assert_close(ours, plain)
    inputs = (x, *attention.parameters())
    direction = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad((ours * direction).sum(), inputs),
        torch.autograd.grad((plain * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(attention.eval()(x), plain)


def attend(device: str, kernel: SDPBackend | None, *, trains_bias: bool) -> list[Tensor]:
    """Output and gradients of q, k, v, and the bias if it is trained; by the formula for no kernel."""
    generator = torch.Generator(device).manual_seed(0)
    # 196 tokens, as at 224 pixels: no multiple of 8, which GPU kernels pad to.
    q, k, v = (torch.randn(2, 3, 196, 32, device=device, generator=generator).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 3, 196, 196, device=device, generator=generator).requires_grad_(trains_bias)
    if kernel is None:
        y = (q @ k.transpose(-1, -2) * 32**-0.5 + bias).softmax(-1) @ v
    else:
        with sdpa_kernel([kernel]):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return [y, *torch.autograd.grad(y.square().sum(), (q, k, v, bias) if trains_bias else (q, k, v))]


def runs(device: str, kernel: SDPBackend, *, trains_bias: bool) -> bool:
    try:
        attend(device, kernel, trains_bias=trains_bias)
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # torch explains each kernel that it refuses
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trains_bias", [True, False])
def test_every_kernel_of_this_machine_equals_the_formula(device: str, trains_bias: bool) -> None:
    expected = attend(device, None, trains_bias=trains_bias)
    available = [kernel for kernel in ATTENTION_BACKENDS if runs(device, kernel, trains_bias=trains_bias)]
    # What the model relies on: a kernel that trains the bias, and a faster one where it is constant.
    wanted = {
        ("cpu", True): [SDPBackend.MATH],
        ("cpu", False): [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    }.get((device, trains_bias), [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    assert available == wanted
    for kernel in available:
        for got, plain in zip(attend(device, kernel, trains_bias=trains_bias), expected, strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


def test_cudnn_is_never_chosen() -> None:
    """It has returned wrong numbers with masks."""
    assert SDPBackend.CUDNN_ATTENTION not in ATTENTION_BACKENDS


def test_the_bias_reaches_the_kernel_once_for_the_batch_and_in_the_dtype_of_the_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    plain = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        seen.append((attn_mask.shape, attn_mask.dtype))
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention = RelativeAttention(16, 16, grid=GRID, variant=DEBUG).bfloat16()
    attention.relative_bias.float()
    attention(torch.randn(5, *GRID, 16).bfloat16())
    assert seen == [(torch.Size([1, 2, 12, 12]), torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        attention.float()(torch.randn(5, *GRID, 16))
    assert seen[1:] == seen[:1]


@pytest.mark.parametrize("form", ["pre_normalization", "post_normalization"])
def test_autocast_computes_in_bf16_and_keeps_float32_weights_tables_and_gradients(form: BiasPlace) -> None:
    """Against the same layer in float32: bf16 rounds to 2^-8."""
    torch.manual_seed(0)
    attention = RelativeAttention(16, 16, grid=GRID, variant=replace(DEBUG, relative_attention=form))
    torch.nn.init.normal_(attention.relative_bias.table)
    x = torch.randn(2, *GRID, 16)
    outputs, gradients = [], []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = attention(x)
        outputs.append(y)
        names, parameters = zip(*attention.named_parameters(), strict=True)
        gradients.append(dict(zip(names, torch.autograd.grad(y.float().square().sum(), parameters), strict=True)))
    assert outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=0.05, atol=0.02)
    for name, exact in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert (gradients[1][name] - exact).norm() < 0.02 * exact.norm(), name


def test_a_strided_block_pools_after_the_norm_and_projects_the_shortcut() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, 16, stride=2, grid=(2, 2), variant=DEBUG).double()
    x = torch.randn(2, 4, 4, 8, dtype=torch.float64)

    def pool(t: Tensor) -> Tensor:
        return F.max_pool2d(t.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    y = block.shortcut(pool(x)) + block.attention(pool(F.layer_norm(x, (8,))))
    expected = y + block.feed_forward.shrink(
        F.gelu(block.feed_forward.expand(F.layer_norm(y, (16,))), approximate="tanh")
    )
    torch.testing.assert_close(block(x), expected)


@pytest.mark.slow
def test_an_exported_model_can_be_decomposed_as_for_onnx_and_keeps_its_bits() -> None:
    """With gradients, as `torch.onnx.export` is called by most, another kernel with other strides is recorded."""
    model = create_model("coatnet_debug", num_classes=3, image_size=32).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(2, 32, 32, 3),), dynamic_shapes=({0: batch},))
    table = torch.export.default_decompositions()
    del table[torch.ops.aten.scaled_dot_product_attention.default]
    decomposed = program.run_decompositions(table)
    images = torch.randn(3, 32, 32, 3)
    assert torch.equal(program.module()(images), model(images))
    torch.testing.assert_close(decomposed.module()(images), model(images), atol=1e-5, rtol=0)
