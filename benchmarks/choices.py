"""Each choice made for speed against the plain way of doing it, forward and backward unless stated otherwise.

python -m benchmarks.choices --variant coatnet_0 --batch 8
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from benchmarks.timing import interleaved, machine, report
from models.attention import ATTENTION_BACKENDS, RelativeAttention, TransformerBlock
from models.drop import draw_kept
from models.mbconv import GatedLinear, MBConv
from models.relative_bias import RelativeBias, expand_relative_bias
from models.variants import VARIANTS, Variant

Choice = tuple[str, str, Callable[[], object], str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="coatnet_0", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_default_device(device)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    print(f"{machine(device)}; {arguments.dtype}, blocks of {arguments.variant} at 224 pixels, batch {arguments.batch}")
    rows: list[dict[str, Any]] = []
    for where, ours, run_ours, plain, run_plain in _choices(VARIANTS[arguments.variant], arguments.batch):
        timings = interleaved({"ours": run_ours, "plain": run_plain}, rounds=arguments.rounds, device=device)
        rows.append(
            {
                "where": where,
                "ours": ours,
                "plain": plain,
                "ms ours": timings["ours"].median * 1e3,
                "ms plain": timings["plain"].median * 1e3,
                "speed": timings["ours"].speed_against(timings["plain"]),
            }
        )
    report("How many times as fast as the plain way", rows, arguments.json)


def _choices(variant: Variant, batch: int) -> Iterator[Choice]:
    s1, s2 = variant.stages[:2]
    s3 = next(stage for stage in variant.stages if stage.kind == "transformer")
    yield _one_by_one("S1 1x1 expansion", torch.randn(batch, 56, 56, s1.width), s1.width)
    yield _one_by_one("S2 1x1 expansion", torch.randn(batch, 28, 28, s2.width), s2.width)
    yield _strided("S1 strided 1x1", torch.randn(batch, 112, 112, variant.stem_width), s1.width)
    yield _gated("S1 gate and 1x1 projection", torch.randn(batch, 56, 56, 4 * s1.width), s1.width)
    for name, side, width in (("S1 MBConv block", 56, s1.width), ("S2 MBConv block", 28, s2.width)):
        x = torch.randn(batch, side, side, width)
        block = MBConv(width, width, stride=1, variant=variant)
        plain = PlainMBConv(width)
        nchw = x.permute(0, 3, 1, 2).contiguous()
        yield name, "channels-last, Linear", _step(block, x), "(B, C, H, W), Conv2d", _step(plain, nchw)
    yield from _attention(variant, s3.width, batch)


def _one_by_one(name: str, x: Tensor, width: int) -> Choice:
    linear = nn.Linear(x.shape[-1], 4 * width, bias=False)
    conv = nn.Conv2d(x.shape[-1], 4 * width, 1, bias=False)
    return name, "Linear", _step(linear, x), "Conv2d", _step(conv, x.permute(0, 3, 1, 2))


def _strided(name: str, x: Tensor, width: int) -> Choice:
    linear = nn.Linear(x.shape[-1], 4 * width, bias=False)
    conv = nn.Conv2d(x.shape[-1], 4 * width, 1, stride=2, bias=False)
    # Not channels-last: with few channels oneDNN's backward then writes out of bounds (its issue 6035).
    nchw = x.permute(0, 3, 1, 2).contiguous()

    def sliced(x: Tensor) -> Tensor:
        y: Tensor = linear(x[:, ::2, ::2])
        return y

    return name, "slice, then Linear", _step(sliced, x, linear), "strided Conv2d, (B, C, H, W)", _step(conv, nchw)


def _gated(name: str, x: Tensor, width: int) -> Choice:
    layer, gate = GatedLinear(x.shape[-1], width), torch.rand(x.shape[0], x.shape[-1], requires_grad=True)

    def ours(x: Tensor) -> Tensor:
        y: Tensor = layer(x, gate)
        return y

    def plain(x: Tensor) -> Tensor:
        return F.linear(x * gate[:, None, None, :], layer.weight, layer.bias)

    return name, "gates the weights", _step(ours, x, layer), "gates the cells", _step(plain, x, layer)


def _attention(variant: Variant, width: int, batch: int) -> Iterator[Choice]:
    x = torch.randn(batch, 14, 14, width)
    heads = width // variant.head_size
    attention = RelativeAttention(width, width, grid=(14, 14), variant=variant)
    ours, plain = "scaled_dot_product_attention", "matmul, softmax, matmul"
    formula = _formula(attention)
    yield "S3 attention", ours, _step(attention, x), plain, _step(formula, x, attention)
    evaluated = RelativeAttention(width, width, grid=(14, 14), variant=variant).eval()
    yield (
        "S3 attention, evaluation", ours, _evaluation(evaluated, x), plain, _evaluation(_formula(evaluated), x),
    )  # fmt: skip

    q, k, v = torch.randn(3, batch, heads, 196, variant.head_size)
    mask = torch.randn(1, heads, 196, 196)

    def fused(q: Tensor) -> Tensor:
        with sdpa_kernel(ATTENTION_BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def written_out(q: Tensor) -> Tensor:
        y: Tensor = ((q * variant.head_size**-0.5) @ k.transpose(-1, -2) + mask).softmax(-1) @ v
        return y

    yield "S3 attention core, evaluation", ours, _evaluation(fused, q), plain, _evaluation(written_out, q)

    table = torch.randn(heads, 27, 27, requires_grad=True)
    rows, columns = torch.arange(14).repeat_interleave(14), torch.arange(14).repeat(14)
    down, right = rows[:, None] - rows + 13, columns[:, None] - columns + 13

    def expand() -> None:
        torch.autograd.grad(expand_relative_bias(table, (14, 14)).sum(), table)

    def gather() -> None:
        torch.autograd.grad(table[:, down, right].sum(), table)

    yield "S3 relative bias", "unfolded table, gradient by sums", expand, "gather by index", gather
    bias = RelativeBias(heads, (14, 14)).eval()
    yield (
        "S3 relative bias, evaluation",
        "cached", _evaluation(lambda x: bias((14, 14), x.dtype), x),
        "expanded each time", _evaluation(lambda x: expand_relative_bias(bias.table, (14, 14)), x),
    )  # fmt: skip

    block = TransformerBlock(width, width, stride=1, grid=(14, 14), variant=variant)

    def kept(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        y: Tensor = block(x, tuple(draw_kept([0.35, 0.35], batch, x.device)))
        return y

    def masked(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        for branch in (block._attend, block._feed_forward):
            mask = (torch.rand(batch, 1, 1, 1) >= 0.35).to(x.dtype) / 0.65
            x = x + branch(x) * mask
        return x

    yield "S3 Transformer block, 35 % dropped", "kept samples", _step(kept, x, block), "mask", _step(masked, x, block)


class PlainMBConv(nn.Sequential):
    """An MBConv block without stride as it is usually written."""

    def __init__(self, width: int) -> None:
        class Gate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(
                    nn.AdaptiveAvgPool2d(1), nn.Conv2d(4 * width, width // 4, 1), nn.SiLU(),
                    nn.Conv2d(width // 4, 4 * width, 1), nn.Sigmoid(),
                )  # fmt: skip

            def forward(self, x: Tensor) -> Tensor:
                gated: Tensor = x * self.layers(x)
                return gated

        super().__init__(
            nn.BatchNorm2d(width), nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width), nn.GELU("tanh"),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, bias=False),
            nn.BatchNorm2d(4 * width), nn.GELU("tanh"), Gate(), nn.Conv2d(4 * width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return y


def _formula(attention: RelativeAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        shape = (batch, height * width, 3, attention.heads, attention.head_size)
        q, k, v = attention.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = (q * attention.head_size**-0.5) @ k.transpose(-1, -2)
        weights = (scores + attention.relative_bias((height, width), x.dtype)).softmax(-1)
        y: Tensor = attention.out((weights @ v).transpose(1, 2).reshape(x.shape))
        return y

    return run


def _step(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module | None = None) -> Callable[[], None]:
    """Forward and backward, to the input and to the parameters of `module`, by default of `run`."""
    parameters = list((run if isinstance(run, nn.Module) else module or nn.Module()).parameters())
    x = x.detach().requires_grad_()

    def step() -> None:
        y = run(x)
        torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)

    return step


def _evaluation(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            run(x)

    return forward


if __name__ == "__main__":
    main()
