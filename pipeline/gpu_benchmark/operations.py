"""The kinds of operations that a CoAtNet consists of, each alone at the shapes that the stage has.

Operations and bytes are those that forward and backward need at least: every tensor is read and written once by each,
and nothing is recomputed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.mbconv import EXPANSION
from models.options import APPROXIMATION
from models.variants import Variant
from pipeline.gpu_benchmark.machine import this_device
from pipeline.gpu_benchmark.record import Operations, OperationWork
from pipeline.gpu_benchmark.subject import MeasuredStage, join
from pipeline.gpu_benchmark.timing import Roofline, median_seconds
from pipeline.plan import TrainPlan

_COPY = 1 << 28  # bytes
_COPY_ON_CPU = 1 << 22
_BACKENDS = {"memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "plain": SDPBackend.MATH}
"""Of attention with a bias that is trained; flash attention and cuDNN's have no gradient for it."""


@dataclass(frozen=True, slots=True)
class _Operation:
    kind: str
    what: str
    run: Callable[[], object]
    operations: int
    bytes: int


def measure_operations(subject: MeasuredStage) -> Operations:
    """Each operation in the dtype in which the stage computes it, eager."""
    plan = subject.plan()
    device = join(plan).device
    roofline = Roofline.of(this_device(device), plan.stage.precision)
    dtype = torch.float32 if plan.stage.precision == "fp32" else torch.bfloat16
    return Operations(tuple(_measured(make, device, roofline) for make in _makers(plan, device, dtype)))


def _measured(make: Callable[[], _Operation], device: torch.device, roofline: Roofline) -> OperationWork:
    """One operation; its tensors are gone when this returns."""
    operation = make()
    try:
        seconds = median_seconds(operation.run, device, most_seconds=0.5)
    except RuntimeError as error:
        return OperationWork(operation.kind, operation.what, None, _why(error))
    return OperationWork(operation.kind, operation.what, roofline.work(seconds, operation.operations, operation.bytes))


def _why(error: RuntimeError) -> str:
    text = str(error).strip().partition("\n")[0]
    no_kernel = text.startswith(("No available kernel", "No viable backend"))
    return "torch has no such kernel for this device" if no_kernel else text


def _makers(plan: TrainPlan, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], _Operation]]:
    """A function for each operation that makes its tensors, so that those of all do not exist at a time."""
    variant, images = plan.stage.model.variant, plan.stage.batch.micro_size
    side = plan.stage.resolution // variant.stem_stride
    tensors = _Tensors(device, dtype)
    for number, stage in enumerate(variant.stages, 1):
        side //= stage.stride
        where, cells = f"S{number}", images * side * side
        hidden = EXPANSION * stage.width
        yield lambda w=where, c=cells, i=stage.width, o=hidden: _matmul(tensors, w, c, i, o)  # type: ignore[misc]
        if stage.kind == "mbconv":
            shape = (images, hidden, side, side)
            yield lambda w=where, s=shape: _depthwise(tensors, w, s)  # type: ignore[misc]
            yield lambda w=where, s=shape: _batch_norm_gelu(tensors, w, s, variant)  # type: ignore[misc]
        else:
            heads = stage.width // variant.head_size
            shape = (images, heads, side * side, variant.head_size)
            for backend in _BACKENDS:
                yield lambda w=where, s=shape, b=backend: _attention(tensors, w, s, b)  # type: ignore[misc]
            yield lambda w=where, c=cells, i=stage.width: _layer_norm(tensors, w, c, i)  # type: ignore[misc]
        yield lambda w=where, c=cells, i=stage.width: _residual(tensors, w, c, i)  # type: ignore[misc]
    yield lambda: _copy(tensors)


@dataclass(frozen=True, slots=True)
class _Tensors:
    device: torch.device
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def __call__(self, *shape: int, trained: bool = True) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_(trained)


def _both_passes(forward: Callable[[], Tensor], *sources: Tensor) -> Callable[[], object]:
    """A forward and the gradients of `sources`, for a gradient of the output that is made once."""
    with torch.no_grad():
        gradient = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), sources, gradient)


def _matmul(tensors: _Tensors, where: str, rows: int, width: int, out: int) -> _Operation:
    x, weight = tensors(rows, width), tensors(out, width)
    run = _both_passes(lambda: F.linear(x, weight), x, weight)
    # Each of the three products reads two of these and writes the third.
    size = 3 * tensors.size * (rows * width + width * out + rows * out)
    return _Operation(
        "matmul", f"{where} ({rows:,} x {width:,}) ({width:,} x {out:,})", run, 6 * rows * width * out, size
    )


def _depthwise(tensors: _Tensors, where: str, shape: tuple[int, int, int, int]) -> _Operation:
    x = tensors(*shape, trained=False).to(memory_format=torch.channels_last).requires_grad_()
    weight = tensors(shape[1], 1, 3, 3)
    run = _both_passes(lambda: F.conv2d(x, weight, padding=1, groups=shape[1]), x, weight)
    what = f"{where} 3x3 of {shape[1]:,} channels, {shape[0]} x {shape[2]} x {shape[3]}"
    return _Operation("depthwise", what, run, 3 * 2 * 9 * x.numel(), 5 * tensors.size * x.numel())


def _batch_norm_gelu(tensors: _Tensors, where: str, shape: tuple[int, int, int, int], variant: Variant) -> _Operation:
    x = tensors(*shape, trained=False).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.ones(shape[1], device=tensors.device, requires_grad=True) for _ in range(2))
    mean, variance = (torch.zeros(shape[1], device=tensors.device) for _ in range(2))
    form = APPROXIMATION[variant.gelu]

    def forward() -> Tensor:
        y = F.batch_norm(x, mean, variance, weight, bias, training=True, eps=variant.batch_norm_epsilon)
        return F.gelu(y, approximate=form)

    run = _both_passes(forward, x, weight, bias)
    what = f"{where} BatchNorm and GELU, {shape[0]} x {shape[2]} x {shape[3]} x {shape[1]:,}"
    # Statistics need a pass of their own: forward reads x twice, backward x and the gradient.
    return _Operation("normalization", what, run, 40 * x.numel(), 8 * tensors.size * x.numel())


def _layer_norm(tensors: _Tensors, where: str, rows: int, width: int) -> _Operation:
    x, weight, bias = tensors(rows, width), tensors(width), tensors(width)
    run = _both_passes(lambda: F.layer_norm(x, (width,), weight, bias), x, weight, bias)
    what = f"{where} LayerNorm, {rows:,} x {width:,}"
    return _Operation("normalization", what, run, 20 * x.numel(), 5 * tensors.size * x.numel())


def _attention(tensors: _Tensors, where: str, shape: tuple[int, int, int, int], backend: str) -> _Operation:
    images, heads, tokens, head = shape
    q, k, v = (tensors(*shape) for _ in range(3))
    bias = tensors(1, heads, tokens, tokens)

    def forward() -> Tensor:
        with sdpa_kernel(_BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def both_passes() -> object:
        y = forward()
        return torch.autograd.grad(y, (q, k, v, bias), torch.ones_like(y))

    what = f"{where} {backend}, {images} x {heads} heads x {tokens:,} x {head}"
    # Two products in the forward and four in the backward; q, k, v and the output in both, and a gradient of each.
    size = tensors.size * (12 * q.numel() + 3 * bias.numel())
    return _Operation("attention", what, both_passes, 12 * images * heads * tokens**2 * head, size)


def _residual(tensors: _Tensors, where: str, rows: int, width: int) -> _Operation:
    x, y = tensors(rows, width, trained=False), tensors(rows, width, trained=False)
    what = f"{where} addition, {rows:,} x {width:,}"
    return _Operation("elementwise", what, lambda: x + y, x.numel(), 3 * tensors.size * x.numel())


def _copy(tensors: _Tensors) -> _Operation:
    size = _COPY if tensors.device.type == "cuda" else _COPY_ON_CPU
    source = torch.zeros(size, dtype=torch.uint8, device=tensors.device)
    target = torch.empty_like(source)
    what = f"{size >> 20} MiB within the device's memory"
    return _Operation("copy", what, lambda: target.copy_(source), 0, 2 * size)
