"""Convolution of any filter, stride, padding, dilation and groups: implicit GEMM.

GEMM view: M = N * OH * OW output pixels, N = K output channels of one group, K = R * S * C
products, channels innermost, so that every slice of the reduction is contiguous in channels_last
memory. Pixel coordinates and the validity of filter rows and columns (one bit each) are computed
once per tile; the loop over (filter row, filter column, channel slice) only adds a scalar offset
and tests two bits.

Narrow groups (ResNeXt, depthwise) are merged: MERGED neighbouring groups become one whose weights
are block-diagonal, so that loads and tensor instructions are wide. The price is arithmetic that
these memory-bound layers have to spare. Zero weights times Inf or NaN would leak into the
neighbours, so a tile that comes out non-finite is computed again, one original group at a time.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import dot, grouped_tile, store_tile


@triton.jit
def any_nonfinite(acc):
    """Whether a tile holds Inf or NaN."""
    return tl.max(tl.where(acc - acc == 0, 0, 1)) != 0


@triton.jit
def accumulate(
    x_ptrs,
    w,
    col0,
    cols,
    valid,
    w_in,
    first,
    last,
    lo,
    hi,
    acc,
    CT: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    W_TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    MASK_C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile acc [BLOCK_M, BLOCK_N] plus the reduction's slices ``first`` to ``last``.

    x_ptrs [BLOCK_M, BLOCK_K] point at the top-left tap of each pixel's window. w is the weight
    matrix [KT, DEPTH], a descriptor of it with W_TMA; ``cols`` are the tile's rows of it, from
    ``col0`` on.
    ``valid`` [BLOCK_M] has bit r set if filter row r lies inside the
    image and bit 16 + s if filter column s does. With MASK_C, only channels lo <= c < hi count.
    STAGES overrides the depth of the software pipeline.
    """
    BLOCK_K: tl.constexpr = x_ptrs.shape[1]
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K  # channel slices per tap
    ks = tl.arange(0, BLOCK_K)
    tap = first // STEPS
    c = (first - tap * STEPS) * BLOCK_K
    r = tap // S
    s = tap - r * S
    w_off = tap * C + c
    if not W_TMA:
        w_ptrs = w + cols[None, :] * DEPTH + ks[:, None]
    for _ in tl.range(first, last, num_stages=STAGES):
        need = (1 << r) | (65536 << s)
        inside = ((valid & need) == need)[:, None]
        x_off = (r * (DIL_H * w_in) + s * DIL_W) * CT + c
        if MASK_C:
            here = (c + ks >= lo) & (c + ks < hi)
            a = tl.load(x_ptrs + x_off, mask=inside & here[None, :], other=0.0)
        else:
            a = tl.load(x_ptrs + x_off, mask=inside, other=0.0)
        if W_TMA:
            b = w.load([col0, w_off]).T
        elif MASK_C:
            b = tl.load(w_ptrs + w_off, mask=here[:, None], other=0.0)
        else:
            b = tl.load(w_ptrs + w_off)
        acc = dot(a, b, acc, PRECISION)
        # Next slice: a channel slice, then the next filter column, then the next filter row.
        c += BLOCK_K
        next_tap = c >= C
        w_off += tl.where(next_tap, C - (STEPS - 1) * BLOCK_K, BLOCK_K)
        c = tl.where(next_tap, 0, c)
        s = tl.where(next_tap, s + 1, s)
        next_row = s == S
        r = tl.where(next_row, r + 1, r)
        s = tl.where(next_row, 0, s)
    return acc


@triton.jit(do_not_specialize=["n", "h", "w_in", "oh", "ow"])
def conv_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    n,
    h,
    w_in,
    oh,
    ow,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    MERGED: tl.constexpr,
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
    W_TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of pixels and output channels of one (merged) group.

    x [n, h, w_in, GROUPS*C], w [GROUPS*K, R, S, C], residual and y [n, oh, ow, GROUPS*K].

    C and K are those of one (merged) group; with SPLIT_K > 1, y is fp32 [SPLIT_K, n*oh*ow, K] and
    GROUPS is 1. Grid (tiles of m times tiles of K times GROUPS, SPLIT_K).
    """
    CT: tl.constexpr = GROUPS * C
    KT: tl.constexpr = GROUPS * K
    STEPS: tl.constexpr = R * S * ((C + BLOCK_K - 1) // BLOCK_K)
    PER_SPLIT: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    EVEN_N: tl.constexpr = K % BLOCK_N == 0
    if WIDE:
        n = n.to(tl.int64)
    m = n * oh * ow
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(m, BLOCK_M), TILES_N * GROUPS, GROUP_M)
    group = tile_n // TILES_N
    col0 = group * K + tile_n % TILES_N * BLOCK_N  # first output channel of the tile
    col_end = group * K + K
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.minimum(col0 + tl.arange(0, BLOCK_N), col_end - 1)
    ks = tl.arange(0, BLOCK_K)

    # Window corner of each pixel, and which filter rows and columns fall inside the image.
    image = rows // (oh * ow)
    oy = (rows // ow - image * oh).to(tl.int32)
    ox = (rows % ow).to(tl.int32)
    iy = oy * STRIDE_H - PAD_H
    ix = ox * STRIDE_W - PAD_W
    valid = tl.zeros((BLOCK_M,), tl.int32)
    for r in tl.static_range(R):
        valid |= ((iy + r * DIL_H >= 0) & (iy + r * DIL_H < h)).to(tl.int32) << r
    for s in tl.static_range(S):
        valid |= ((ix + s * DIL_W >= 0) & (ix + s * DIL_W < w_in)).to(tl.int32) << (16 + s)
    valid = tl.where(rows < m, valid, 0)

    corner = (image * h + iy) * w_in + ix
    x_ptrs = x + corner[:, None] * CT + (group * C + ks)[None, :]
    first = tl.program_id(1) * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, STEPS)
    if MERGED > 1:
        # A bound that the compiler cannot see keeps the loops rolled: there are two.
        last = tl.minimum(last, n * STEPS).to(tl.int32)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(
        x_ptrs, w, col0, cols, valid, w_in, first, last, 0, C, zeros,
        CT, C, S, DIL_H, DIL_W, W_TMA, R * S * C, C % BLOCK_K != 0, None, PRECISION,
    )  # fmt: skip
    if MERGED > 1:  # noqa: SIM102 (one is decided when compiling)
        if any_nonfinite(acc):
            ONE_C: tl.constexpr = C // MERGED
            ONE_K: tl.constexpr = K // MERGED
            for one in range(MERGED):
                alone = accumulate(
                    x_ptrs, w, col0, cols, valid, w_in, first, last, one * ONE_C,
                    one * ONE_C + ONE_C, zeros,
                    CT, C, S, DIL_H, DIL_W, W_TMA, R * S * C, True, 1, PRECISION,
                )  # fmt: skip
                mine = (cols - group * K) // ONE_K == one
                acc = tl.where(mine[None, :], alone, acc)
    if SPLIT_K > 1:
        y += tl.program_id(1) * m * KT
    store_tile(acc, scale, shift, residual, y, rows, m, col0, col_end, KT, EVEN_N, EPILOGUE, PARTS)
