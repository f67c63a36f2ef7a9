"""Triton kernels that normalize, activate and differentiate both, in passes over whole images.

Images are (B, H, W, C), contiguous, in float32 or bfloat16; P is H x W; all arithmetic is float32. A program
goes through one of the CHUNKS of an image for BC channels, BP pixels at a time. Sums over pixels are partial, one row
for each chunk of each image, and added by torch: without atomics the order of additions, and with it the result, is
always the same. `norm` is (4, C) float32: a and b of the normalization a x + b, the mean, and the reciprocal of the
standard deviation.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """GELU and its derivative; the approximation with tanh is z sigmoid(2 u), in which nothing cancels."""
    if TANH:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:  # noqa: RET505 (of constants, only the branch that is taken is compiled)
        s = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * s, s + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def _place(P, C, CHUNKS, BC: tl.constexpr):
    """Which image, pixels and channels a program has, and where they begin in a tensor of P pixels an image."""
    block = tl.program_id(0)
    part = block // tl.cdiv(C, BC)
    c = (block % tl.cdiv(C, BC)) * BC + tl.arange(0, BC)
    image = (part // CHUNKS).to(tl.int64)
    size = tl.cdiv(P, CHUNKS)
    first = (part % CHUNKS) * size
    return part, image, first, tl.minimum(first + size, P), c, c < C


@triton.jit
def store_moments(partial, part, count, mean, squares, c, is_channel, C):
    """Merge the moments of the rows of a tile, each of `count` values, and store them (Chan et al., 1979)."""
    total = tl.sum(count, 0)
    divisor = tl.maximum(total, 1.0)
    centre = tl.sum(mean * count, 0) / divisor
    squares = tl.sum(squares + count * (mean - centre) * (mean - centre), 0)
    partial += part.to(tl.int64) * 3 * C + c
    tl.store(partial, tl.zeros_like(centre) + total, mask=is_channel)
    tl.store(partial + C, centre, mask=is_channel)
    tl.store(partial + 2 * C, squares, mask=is_channel)


@triton.jit
def moments(x, partial, P, C, CHUNKS, BP: tl.constexpr, BC: tl.constexpr):
    """Count, mean and sum of squared deviations of each channel (Welford's recurrence): -> partial (parts, 3, C)."""
    part, image, first, last, c, is_channel = _place(P, C, CHUNKS, BC)
    x += image * P * C + c[None, :]
    count = tl.zeros([BP, 1], tl.float32)
    mean = tl.zeros([BP, BC], tl.float32)
    squares = tl.zeros([BP, BC], tl.float32)
    for start in range(first, last, BP):
        p = (start + tl.arange(0, BP))[:, None]
        value = tl.load(x + p * C, mask=(p < last) & is_channel[None, :], other=0.0).to(tl.float32)
        count += tl.where(p < last, 1.0, 0.0)
        change = tl.where(p < last, value - mean, 0.0)
        mean += change / tl.maximum(count, 1.0)
        squares += change * (value - mean)
    store_moments(partial, part, count, mean, squares, c, is_channel, C)


@triton.jit
def activate(y, norm, out, partial, P, C, CHUNKS, TANH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """GELU(a y + b) -> out, and the sums of what is stored: -> partial (parts, C)."""
    part, image, first, last, c, is_channel = _place(P, C, CHUNKS, BC)
    a = tl.load(norm + c, mask=is_channel, other=0.0)[None, :]
    b = tl.load(norm + C + c, mask=is_channel, other=0.0)[None, :]
    base = image * P * C + c[None, :]
    total = tl.zeros([BP, BC], tl.float32)
    for start in range(first, last, BP):
        p = (start + tl.arange(0, BP))[:, None]
        inside = (p < last) & is_channel[None, :]
        value, _ = gelu(tl.load(y + base + p * C, mask=inside, other=0.0).to(tl.float32) * a + b, TANH)
        value = value.to(out.dtype.element_ty)
        tl.store(out + base + p * C, value, mask=inside)
        total += tl.where(inside, value.to(tl.float32), 0.0)
    tl.store(partial + part.to(tl.int64) * C + c, tl.sum(total, 0), mask=is_channel)


@triton.jit
def activate_backward(
    gradient, pooled, y, norm, partial, P, C, CHUNKS, TANH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """For dz, the gradient before GELU: the sums of dz and of dz times the normalized y: -> partial (parts, 2, C).

    The gradient of GELU's output is `gradient` + `pooled` (B, C).
    """
    part, image, first, last, c, is_channel = _place(P, C, CHUNKS, BC)
    a = tl.load(norm + c, mask=is_channel, other=0.0)[None, :]
    b = tl.load(norm + C + c, mask=is_channel, other=0.0)[None, :]
    mean = tl.load(norm + 2 * C + c, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(norm + 3 * C + c, mask=is_channel, other=0.0)[None, :]
    extra = tl.load(pooled + image * C + c, mask=is_channel, other=0.0)[None, :]
    base = image * P * C + c[None, :]
    shift_sum = tl.zeros([BP, BC], tl.float32)
    scale_sum = tl.zeros([BP, BC], tl.float32)
    for start in range(first, last, BP):
        p = (start + tl.arange(0, BP))[:, None]
        inside = (p < last) & is_channel[None, :]
        value = tl.load(y + base + p * C, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(gradient + base + p * C, mask=inside, other=0.0).to(tl.float32) + extra
        _, slope = gelu(value * a + b, TANH)
        dz = tl.where(inside, dz * slope, 0.0)
        shift_sum += dz
        scale_sum += dz * (value - mean) * scale
    partial += part.to(tl.int64) * 2 * C + c
    tl.store(partial, tl.sum(shift_sum, 0), mask=is_channel)
    tl.store(partial + C, tl.sum(scale_sum, 0), mask=is_channel)


@triton.jit
def input_gradient(
    gradient, pooled, x, norm, means, out, P, C, CHUNKS, ACTIVATED: tl.constexpr, TANH: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of BatchNorm: a (dz - mean(dz) - xhat mean(dz xhat)) -> out, with the two means in `means` (2, C).

    `gradient` is dz or, if ACTIVATED, as for `activate_backward`. `out` may be `gradient`.
    """
    _part, image, first, last, c, is_channel = _place(P, C, CHUNKS, BC)
    a = tl.load(norm + c, mask=is_channel, other=0.0)[None, :]
    b = tl.load(norm + C + c, mask=is_channel, other=0.0)[None, :]
    mean = tl.load(norm + 2 * C + c, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(norm + 3 * C + c, mask=is_channel, other=0.0)[None, :]
    shift_mean = tl.load(means + c, mask=is_channel, other=0.0)[None, :]
    scale_mean = tl.load(means + C + c, mask=is_channel, other=0.0)[None, :]
    base = image * P * C + c[None, :]
    for start in range(first, last, BP):
        p = (start + tl.arange(0, BP))[:, None]
        inside = (p < last) & is_channel[None, :]
        value = tl.load(x + base + p * C, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(gradient + base + p * C, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATED:
            extra = tl.load(pooled + image * C + c, mask=is_channel, other=0.0)[None, :]
            _, slope = gelu(value * a + b, TANH)
            dz = (dz + extra) * slope
        dx = a * (dz - shift_mean - (value - mean) * scale * scale_mean)
        tl.store(out + base + p * C, dx.to(out.dtype.element_ty), mask=inside)
