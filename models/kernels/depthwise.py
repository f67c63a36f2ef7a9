"""Triton kernels of a 3x3 depthwise convolution, padded by one, of GELU(a x + b), and of its gradient.

As in `models.kernels.normalization`, with x (B, H, W, C), y (B, OUT_H, OUT_W, C), and `weight` (9, C) float32, the
taps row by row. A program has BW columns and BC channels and goes from row to row.
"""

import triton
import triton.language as tl

from models.kernels.normalization import gelu, store_moments


@triton.jit
def _activated(x, a, b, row, column, c, is_channel, H, W, C, TANH: tl.constexpr):
    """GELU(a x + b) in one row of an image; outside of the image 0, which is not GELU(b)."""
    inside = ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None]
    offset = (row * W + column) * C
    value = tl.load(x + offset[:, None] + c[None, :], mask=inside & is_channel[None, :], other=0.0).to(tl.float32)
    value, _ = gelu(value * a + b, TANH)
    return tl.where(inside, value, 0.0)


@triton.jit
def _weights(weight, row: tl.constexpr, c, is_channel, C):
    """The three taps of a row of the kernel, (1, BC) each."""
    weight += 3 * row * C + c
    left = tl.load(weight, mask=is_channel, other=0.0)[None, :]
    middle = tl.load(weight + C, mask=is_channel, other=0.0)[None, :]
    right = tl.load(weight + 2 * C, mask=is_channel, other=0.0)[None, :]
    return left, middle, right


@triton.jit
def depthwise(
    x, norm, weight, y, partial, H, W, C, OUT_H, OUT_W, CHUNKS, STRIDE: tl.constexpr, TANH: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The convolution -> y, and the moments of what is stored: -> partial (parts, 3, C).

    Each activation of a row is computed for its three columns, and added to the three outputs that it is part of: two
    of them wait for later rows.
    """
    block = tl.program_id(0)
    c = (block % tl.cdiv(C, BC)) * BC + tl.arange(0, BC)
    part = block // tl.cdiv(C, BC)
    column = (part % tl.cdiv(OUT_W, BW)) * BW + tl.arange(0, BW)
    chunk = part // tl.cdiv(OUT_W, BW)
    size = tl.cdiv(OUT_H, CHUNKS)
    first = (chunk % CHUNKS) * size
    last = tl.minimum(first + size, OUT_H)
    image = (chunk // CHUNKS).to(tl.int64)
    is_channel, is_column = c < C, (column < OUT_W)[:, None]
    a = tl.load(norm + c, mask=is_channel, other=0.0)[None, :]
    b = tl.load(norm + C + c, mask=is_channel, other=0.0)[None, :]
    w00, w01, w02 = _weights(weight, 0, c, is_channel, C)
    w10, w11, w12 = _weights(weight, 1, c, is_channel, C)
    w20, w21, w22 = _weights(weight, 2, c, is_channel, C)
    x += image * H * W * C
    y += image * OUT_H * OUT_W * C
    j = STRIDE * column

    left = _activated(x, a, b, STRIDE * first - 1, j - 1, c, is_channel, H, W, C, TANH)
    middle = _activated(x, a, b, STRIDE * first - 1, j, c, is_channel, H, W, C, TANH)
    right = _activated(x, a, b, STRIDE * first - 1, j + 1, c, is_channel, H, W, C, TANH)
    current = w00 * left + w01 * middle + w02 * right
    following = tl.zeros([BW, BC], tl.float32)
    if STRIDE == 1:
        left = _activated(x, a, b, first, j - 1, c, is_channel, H, W, C, TANH)
        middle = _activated(x, a, b, first, j, c, is_channel, H, W, C, TANH)
        right = _activated(x, a, b, first, j + 1, c, is_channel, H, W, C, TANH)
        current += w10 * left + w11 * middle + w12 * right
        following = w00 * left + w01 * middle + w02 * right
    count = 0.0
    mean = tl.zeros([BW, BC], tl.float32)
    squares = tl.zeros([BW, BC], tl.float32)
    # The loads of the next row are under way while this one is computed.
    for row in tl.range(first, last, num_stages=2):
        if STRIDE == 2:
            left = _activated(x, a, b, 2 * row, j - 1, c, is_channel, H, W, C, TANH)
            middle = _activated(x, a, b, 2 * row, j, c, is_channel, H, W, C, TANH)
            right = _activated(x, a, b, 2 * row, j + 1, c, is_channel, H, W, C, TANH)
            current += w10 * left + w11 * middle + w12 * right
        left = _activated(x, a, b, STRIDE * row + 1, j - 1, c, is_channel, H, W, C, TANH)
        middle = _activated(x, a, b, STRIDE * row + 1, j, c, is_channel, H, W, C, TANH)
        right = _activated(x, a, b, STRIDE * row + 1, j + 1, c, is_channel, H, W, C, TANH)
        value = (current + w20 * left + w21 * middle + w22 * right).to(y.dtype.element_ty)
        offset = ((row * OUT_W + column) * C)[:, None] + c[None, :]
        tl.store(y + offset, value, mask=is_column & is_channel[None, :])
        if STRIDE == 1:
            current = following + w10 * left + w11 * middle + w12 * right
            following = w00 * left + w01 * middle + w02 * right
        else:
            current = w00 * left + w01 * middle + w02 * right
        value = value.to(tl.float32)
        count += 1.0
        change = value - mean
        mean += change / count
        squares += change * (value - mean)
    counts = tl.where(is_column, count, 0.0)
    store_moments(partial, part, counts, mean, tl.where(is_column, squares, 0.0), c, is_channel, C)


@triton.jit
def _upstream(dy, row, column, ROW: tl.constexpr, COLUMN: tl.constexpr, c, is_channel, OUT_H, OUT_W, C,
              STRIDE: tl.constexpr):  # fmt: skip
    """The gradient of the output that has the input at `row` and `column` as its tap (ROW, COLUMN); 0 if none has."""
    i, j = row + 1 - ROW, column + 1 - COLUMN
    inside = (i >= 0) & (j >= 0) & (i % STRIDE == 0) & (j % STRIDE == 0)
    i, j = i // STRIDE, j // STRIDE
    inside = (inside & (i < OUT_H) & (j < OUT_W))[:, None] & is_channel[None, :]
    return tl.load(dy + ((i * OUT_W + j) * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def depthwise_backward(
    dy, x, norm, weight, dz, partial, ROWS, H, W, C, OUT_H, OUT_W, SIZE, STRIDE: tl.constexpr, TANH: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient before GELU -> dz, and for each channel -> partial (parts, 11, C): the sums of dz and of dz times
    the normalized x, and the gradients of the nine taps.

    The ROWS = B x H rows of all images are one sequence, of which a program has SIZE.
    """
    block = tl.program_id(0)
    c = (block % tl.cdiv(C, BC)) * BC + tl.arange(0, BC)
    part = block // tl.cdiv(C, BC)
    column = (part % tl.cdiv(W, BW)) * BW + tl.arange(0, BW)
    first = (part // tl.cdiv(W, BW)) * SIZE
    is_channel, is_column = c < C, (column < W)[:, None]
    a = tl.load(norm + c, mask=is_channel, other=0.0)[None, :]
    b = tl.load(norm + C + c, mask=is_channel, other=0.0)[None, :]
    mean = tl.load(norm + 2 * C + c, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(norm + 3 * C + c, mask=is_channel, other=0.0)[None, :]
    w00, w01, w02 = _weights(weight, 0, c, is_channel, C)
    w10, w11, w12 = _weights(weight, 1, c, is_channel, C)
    w20, w21, w22 = _weights(weight, 2, c, is_channel, C)
    shift_sum = tl.zeros([BW, BC], tl.float32)
    scale_sum, g00, g01, g02, g10 = shift_sum, shift_sum, shift_sum, shift_sum, shift_sum
    g11, g12, g20, g21, g22 = shift_sum, shift_sum, shift_sum, shift_sum, shift_sum
    for position in range(first, tl.minimum(first + SIZE, ROWS)):
        image, row = (position // H).to(tl.int64), position % H
        offset = image * H * W * C + ((row * W + column) * C)[:, None] + c[None, :]
        inside = is_column & is_channel[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        activation, slope = gelu(value * a + b, TANH)
        activation = tl.where(inside, activation, 0.0)
        d = dy + image * OUT_H * OUT_W * C
        tap = _upstream(d, row, column, 0, 0, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g00 = w00 * tap, g00 + activation * tap
        tap = _upstream(d, row, column, 0, 1, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g01 = gradient + w01 * tap, g01 + activation * tap
        tap = _upstream(d, row, column, 0, 2, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g02 = gradient + w02 * tap, g02 + activation * tap
        tap = _upstream(d, row, column, 1, 0, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g10 = gradient + w10 * tap, g10 + activation * tap
        tap = _upstream(d, row, column, 1, 1, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g11 = gradient + w11 * tap, g11 + activation * tap
        tap = _upstream(d, row, column, 1, 2, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g12 = gradient + w12 * tap, g12 + activation * tap
        tap = _upstream(d, row, column, 2, 0, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g20 = gradient + w20 * tap, g20 + activation * tap
        tap = _upstream(d, row, column, 2, 1, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g21 = gradient + w21 * tap, g21 + activation * tap
        tap = _upstream(d, row, column, 2, 2, c, is_channel, OUT_H, OUT_W, C, STRIDE)
        gradient, g22 = gradient + w22 * tap, g22 + activation * tap
        gradient = tl.where(inside, gradient * slope, 0.0)
        tl.store(dz + offset, gradient.to(dz.dtype.element_ty), mask=inside)
        shift_sum += gradient
        scale_sum += gradient * (value - mean) * scale
    partial += part.to(tl.int64) * 11 * C + c
    tl.store(partial, tl.sum(shift_sum, 0), mask=is_channel)
    tl.store(partial + C, tl.sum(scale_sum, 0), mask=is_channel)
    tl.store(partial + 2 * C, tl.sum(g00, 0), mask=is_channel)
    tl.store(partial + 3 * C, tl.sum(g01, 0), mask=is_channel)
    tl.store(partial + 4 * C, tl.sum(g02, 0), mask=is_channel)
    tl.store(partial + 5 * C, tl.sum(g10, 0), mask=is_channel)
    tl.store(partial + 6 * C, tl.sum(g11, 0), mask=is_channel)
    tl.store(partial + 7 * C, tl.sum(g12, 0), mask=is_channel)
    tl.store(partial + 8 * C, tl.sum(g20, 0), mask=is_channel)
    tl.store(partial + 9 * C, tl.sum(g21, 0), mask=is_channel)
    tl.store(partial + 10 * C, tl.sum(g22, 0), mask=is_channel)
