"""Convolutions of few input channels: the stem, with and without its pool, and its like.

With C = 3 a slice of one filter tap would be three products. So x is first copied into an image
that carries its zero border and CP >= C channels (``pad_kernel`` of ``images``): then the S taps of
one filter row are one contiguous run of SEG = power of two >= S * CP elements, which starts on a
16-byte boundary, and a slice of the reduction is BLOCK_K / SEG filter rows: no masks, no divisions
in the loop. Weights [K, rows, SEG] are zero where a run is longer than the filter. Zero weights
times Inf or NaN would count pixels that are none of the window's, so a tile that comes out
non-finite is computed again with masks.

``stem_pool_kernel`` adds ReLU and the 3x3 max-pool of stride 2. A program walks down the conv rows
of a strip of one image and keeps the pooled columns of the rows before it in registers, so that
neither conv rows nor columns go to memory; only the row above each strip is computed twice. For
224x224 images, 128 of 112 columns and 2 P + 1 of 2 P rows are computed: 22% more than needed at P =
7.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .conv import any_nonfinite
from .epilogue import affine_act, dot, grouped_tile, round_to, store_tile


@triton.jit
def _accumulate_rows(
    x_ptrs,
    w_ptrs,
    row_stride,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    SEG: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The whole reduction of a tile: [BLOCK_M, BLOCK_N] in fp32.

    x_ptrs [BLOCK_M, BLOCK_K] point at the first filter rows of each window, w_ptrs [BLOCK_K,
    BLOCK_N] at their weights; RUN = S * CP elements of a run of SEG belong to the filter.
    """
    BLOCK_K: tl.constexpr = x_ptrs.shape[1]
    ROWS: tl.constexpr = BLOCK_K // SEG  # filter rows per slice
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((x_ptrs.shape[0], BLOCK_N), tl.float32)
    # A bound that the compiler cannot see keeps the loop rolled: unrolled, it takes all registers.
    for first in tl.range(0, tl.minimum(R, row_stride), ROWS, num_stages=STAGES):
        if EXACT:
            real = (ks % SEG < RUN) & (first + ks // SEG < R)
            a = tl.load(x_ptrs, mask=real[None, :], other=0.0)
        else:
            a = tl.load(x_ptrs)
        acc = dot(a, tl.load(w_ptrs), acc, PRECISION)
        x_ptrs += ROWS * row_stride
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def _pointers(
    x,
    w,
    image,
    oy,
    ox,
    cols,
    hp,
    row_stride,
    R: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STEP_W: tl.constexpr,
    SEG: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x_ptrs [pixels, BLOCK_K] and w_ptrs [BLOCK_K, channels] of output pixels (image, oy, ox)."""
    ROWS: tl.constexpr = BLOCK_K // SEG
    DEPTH: tl.constexpr = (R + ROWS - 1) // ROWS * BLOCK_K
    ks = tl.arange(0, BLOCK_K)
    corner = (image * hp + oy * STRIDE_H) * row_stride + ox * STEP_W
    x_ptrs = x + corner[:, None] + (ks // SEG * row_stride + ks % SEG)[None, :]
    return x_ptrs, w + cols[None, :] * DEPTH + ks[:, None]


@triton.jit(do_not_specialize=["n", "oh", "ow", "hp", "row_units"])
def conv_rows_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    n,
    oh,
    ow,
    hp,
    row_units,
    K: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    SEG: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STEP_W: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of pixels and output channels.

    x [n, hp, row_units * UNIT] (rows of padded images), w [K, rows, SEG], residual and y
    [n, oh, ow, K].

    UNIT elements are 16 bytes; STEP_W = stride * CP elements lie between neighbouring windows.
    Grid (tiles of n*oh*ow times tiles of K).
    """
    EVEN_N: tl.constexpr = K % BLOCK_N == 0
    if WIDE:
        n = n.to(tl.int64)
    m = n * oh * ow
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), (K + BLOCK_N - 1) // BLOCK_N, GROUP_M
    )
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = tile_n * BLOCK_N
    cols = tl.minimum(col0 + tl.arange(0, BLOCK_N), K - 1)
    # Rows beyond the edge compute the last pixel again: no mask in the loop.
    pixel = tl.minimum(rows, m - 1)
    row_stride = row_units * UNIT
    x_ptrs, w_ptrs = _pointers(
        x, w, pixel // (oh * ow), pixel // ow % oh, pixel % ow, cols, hp, row_stride,
        R, STRIDE_H, STEP_W, SEG, BLOCK_K,
    )  # fmt: skip
    acc = _accumulate_rows(x_ptrs, w_ptrs, row_stride, BLOCK_N, R, RUN, SEG, False, None, PRECISION)
    if any_nonfinite(acc):
        acc = _accumulate_rows(x_ptrs, w_ptrs, row_stride, BLOCK_N, R, RUN, SEG, True, 1, PRECISION)
    store_tile(acc, scale, shift, residual, y, rows, m, col0, K, K, EVEN_N, EPILOGUE, PARTS)


@triton.jit
def _pool_columns(z):
    """[BLOCK_M, BLOCK_N] conv columns to [BLOCK_M / 2, BLOCK_N]: max of columns 2j, 2j + 1, 2j + 2.

    The last one lacks its third column and is not used.
    """
    HALF: tl.constexpr = z.shape[0] // 2
    even, odd = tl.split(tl.permute(tl.reshape(z, (HALF, 2, z.shape[1])), (0, 2, 1)))
    after = tl.minimum(tl.arange(0, HALF) + 1, HALF - 1)
    after = tl.broadcast_to(after[:, None], (HALF, z.shape[1]))
    pair = tl.maximum(even, odd, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(pair, tl.gather(even, after, 0), propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["oh", "ow", "ph", "pw", "hp", "row_units", "strip"])
def stem_pool_kernel(
    x,
    w,
    scale,
    shift,
    y,
    oh,
    ow,
    ph,
    pw,
    hp,
    row_units,
    strip,
    K: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    SEG: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STEP_W: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A strip of pooled rows: y [n, ph, pw, K] = maxpool(relu(affine(conv(x)))).

    x and w are those of ``conv_rows_kernel``.

    Grid (strips of ``strip`` pooled rows, times tiles of BLOCK_M/2 - 1 pooled columns; tiles of K;
    images).
    """
    WIDTH: tl.constexpr = BLOCK_M // 2 - 1  # pooled columns of a tile
    tiles_w = tl.cdiv(pw, WIDTH)
    image = tl.program_id(2)
    if WIDE:
        image = image.to(tl.int64)
    first = tl.program_id(0) // tiles_w * strip
    col = tl.program_id(0) % tiles_w * WIDTH + tl.arange(0, BLOCK_M // 2)
    inside = (tl.arange(0, BLOCK_M // 2) < WIDTH) & (col < pw)
    ks = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.minimum(ks, K - 1)
    a = tl.load(scale + channel)
    b = tl.load(shift + channel)
    ox = tl.program_id(0) % tiles_w * (2 * WIDTH) - 1 + tl.arange(0, BLOCK_M)
    row_stride = row_units * UNIT
    last = tl.minimum(first + strip, ph)
    below = tl.zeros((BLOCK_M // 2, BLOCK_N), tl.float32)  # pooled columns of the rows so far
    # Conv rows 2 p - 1, 2 p and 2 p + 1 make pooled row p. Values are >= 0, so 0 stands for
    # nothing.
    for oy in tl.range(2 * first - 1, 2 * last):
        row = tl.minimum(tl.maximum(oy, 0), oh - 1)
        x_ptrs, w_ptrs = _pointers(
            x, w, image, row, tl.minimum(tl.maximum(ox, 0), ow - 1), channel, hp, row_stride,
            R, STRIDE_H, STEP_W, SEG, BLOCK_K,
        )  # fmt: skip
        acc = _accumulate_rows(
            x_ptrs, w_ptrs, row_stride, BLOCK_N, R, RUN, SEG, False, None, PRECISION
        )
        if any_nonfinite(acc):
            acc = _accumulate_rows(
                x_ptrs, w_ptrs, row_stride, BLOCK_N, R, RUN, SEG, True, 1, PRECISION
            )
        z = affine_act(acc, a, b, acc, "relu")
        real = (ox >= 0) & (ox < ow) & (oy >= 0) & (oy < oh)
        pooled = _pool_columns(tl.where(real[:, None], z, 0.0))
        both = tl.maximum(below, pooled, propagate_nan=tl.PropagateNan.ALL)
        done = (oy % 2 != 0) & (oy > 2 * first)
        offsets = ((image * ph + oy // 2) * pw + col)[:, None] * K + ks[None, :]
        mask = (inside & done)[:, None] & (ks < K)[None, :]
        tl.store(y + offsets, round_to(both, y.dtype.element_ty), mask=mask)
        below = tl.where(oy % 2 != 0, pooled, both)
