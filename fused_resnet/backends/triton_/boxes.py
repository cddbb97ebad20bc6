"""Implicit GEMM whose pixels come as boxes of the image, through tensor descriptors: for sm_100.

Why a second formulation of ``conv``: tcgen05 reads both operands from shared memory, and pixels
that cp.async writes there pass the same 128 bytes a clock. A tile of 128 pixels by 128 channels
then stays at two thirds of the tensor rate (*predicted*). TMA writes by a path of its own, and asks
for one instruction a slice instead of an address for each pixel.

A tile is a box of images, rows and columns of the output, a power of two of each and BLOCK_M in
all. At one filter tap its pixels are a box of the input again, once the input is seen as

    [N, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * C]

which is the same memory: row 2 * oy - 1 of a convolution of stride 2 is row oy - 1 of the odd ones.
Strides must divide the image. Zero padding is what TMA reads beyond the edges, at -1 too.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import dot, grouped_tile, store_tile


@triton.jit(do_not_specialize=["n", "oh", "ow"])
def conv_boxes_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    n,
    oh,
    ow,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One box of pixels and BLOCK_N output channels.

    x: descriptor of the view above, box (images, rows, 1, columns, BLOCK_K); w: of [K, R*S*C], box
    (BLOCK_N, BLOCK_K); residual and y [n, oh, ow, K]. C is a multiple of BLOCK_K. With SPLIT_K > 1,
    y is fp32 [SPLIT_K, n*oh*ow, K]. WIDE computes the offsets of y in 64 bits.

    Grid (boxes of pixels times tiles of K, SPLIT_K).
    """
    IMAGES: tl.constexpr = x.block_shape[0]
    ROWS: tl.constexpr = x.block_shape[1]
    COLUMNS: tl.constexpr = x.block_shape[3]
    tl.static_assert(IMAGES * ROWS * COLUMNS == BLOCK_M)
    tl.static_assert(C % BLOCK_K == 0)
    STEPS: tl.constexpr = R * S * (C // BLOCK_K)
    PER_SPLIT: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
    across = tl.cdiv(ow, COLUMNS)
    down = tl.cdiv(oh, ROWS)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(n, IMAGES) * down * across, (K + BLOCK_N - 1) // BLOCK_N, GROUP_M
    )
    col0 = tile_n * BLOCK_N
    line = tile_m // across
    ox0 = (tile_m - line * across) * COLUMNS
    oy0 = line % down * ROWS
    image0 = line // down * IMAGES

    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, STEPS)
    tap = first // (C // BLOCK_K)
    c = (first - tap * (C // BLOCK_K)) * BLOCK_K
    r = tap // S
    s = tap - r * S
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        # Tap r lies r * DIL_H - PAD_H below the pixel's own place: whole strides, and a parity.
        # Strides enough are added to keep the dividend positive, and taken off the quotient.
        dy = r * DIL_H + PAD_H * (STRIDE_H - 1)
        dx = s * DIL_W + PAD_W * (STRIDE_W - 1)
        a = x.load(
            [
                image0,
                oy0 + dy // STRIDE_H - PAD_H,
                dy % STRIDE_H,
                ox0 + dx // STRIDE_W - PAD_W,
                dx % STRIDE_W * C + c,
            ]
        )
        b = w.load([col0, step * BLOCK_K])
        acc = dot(a.reshape(BLOCK_M, BLOCK_K), b.T, acc, PRECISION)
        # Next slice: a channel slice, then the next filter column, then the next filter row.
        c += BLOCK_K
        next_tap = c == C
        c = tl.where(next_tap, 0, c)
        s = tl.where(next_tap, s + 1, s)
        next_row = s == S
        r = tl.where(next_row, r + 1, r)
        s = tl.where(next_row, 0, s)

    if WIDE:
        n = n.to(tl.int64)
        image0 = image0.to(tl.int64)
    m = n * oh * ow
    at = tl.arange(0, BLOCK_M)
    ox = ox0 + at % COLUMNS
    oy = oy0 + at // COLUMNS % ROWS
    image = image0 + at // (COLUMNS * ROWS)
    # Pixels of the box beyond the image's edge count as rows beyond the last one: images beyond n
    # are so already.
    rows = tl.where((oy < oh) & (ox < ow), (image * oh + oy) * ow + ox, m)
    if SPLIT_K > 1:
        y += tl.program_id(1) * m * K
    store_tile(
        acc, scale, shift, residual, y, rows, m, col0, K, K, K % BLOCK_N == 0, EPILOGUE, PARTS
    )
