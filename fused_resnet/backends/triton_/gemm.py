"""1x1 convolution of stride 1: a matrix product over pixels.

    y[M, K] = epilogue(x[M, C] @ w[K, C]^T),  M = N * H * W rows of a channels_last tensor

Both operands are contiguous along the reduction, which is what tensor cores want. Two schedules:
``gemm_kernel`` loads through pointers (cp.async on sm_80 and later), one program a tile;
``gemm_tma_kernel`` loads and stores through tensor descriptors (TMA on sm_90 and later),
persistent. At least M*C + K*C + M*K elements (and the residual's M*K) pass through memory for
2*M*C*K operations.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import affine_act, column_halves, dot, grouped_tile, round_to, store_tile


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    m,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of y; x [m, C], w [K, C], residual and y [m, K].

    Grid (tiles of m times tiles of K). WIDE computes offsets in 64 bits.
    """
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M
    )
    EVEN_N: tl.constexpr = K % BLOCK_N == 0
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the edge read the last one again: no mask in the loop.
    x_ptrs = x + tl.minimum(rows, m - 1)[:, None] * C + ks[None, :]
    w_ptrs = w + tl.minimum(cols, K - 1)[None, :] * C + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range((C + BLOCK_K - 1) // BLOCK_K):
        if C % BLOCK_K == 0:
            a = tl.load(x_ptrs)
            b = tl.load(w_ptrs)
        else:
            left = C - step * BLOCK_K
            a = tl.load(x_ptrs, mask=(ks < left)[None, :], other=0.0)
            b = tl.load(w_ptrs, mask=(ks < left)[:, None], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    store_tile(
        acc, scale, shift, residual, y, rows, m, tile_n * BLOCK_N, K, K, EVEN_N, EPILOGUE, PARTS
    )


@triton.jit
def _store_boxes(
    acc, scale, shift, residual, y, row0, col0, K: tl.constexpr, EPILOGUE: tl.constexpr
):
    """``store_tile`` by descriptors, in column blocks as wide as y's box; TMA clips the edges."""
    if acc.shape[1] > y.block_shape[1]:
        left, right = column_halves(acc)
        _store_boxes(left, scale, shift, residual, y, row0, col0, K, EPILOGUE)
        _store_boxes(right, scale, shift, residual, y, row0, col0 + left.shape[1], K, EPILOGUE)
    else:
        cols = tl.minimum(col0 + tl.arange(0, acc.shape[1]), K - 1)
        r = acc
        if EPILOGUE == "add" or EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
            r = residual.load([row0, col0]).to(tl.float32)
        z = affine_act(acc, tl.load(scale + cols), tl.load(shift + cols), r, EPILOGUE)
        y.store([row0, col0], round_to(z, y.dtype))


@triton.jit(do_not_specialize=["m"])
def gemm_tma_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    m,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Tiles of y, one after the other.

    Descriptors: x [m, C] box (BLOCK_M, BLOCK_K), w [K, C] box (BLOCK_N, BLOCK_K),
    residual and y [m, K] box (BLOCK_M, BLOCK_N / parts).

    Grid (as many programs as run at once): each walks over tiles. C and K need no multiple of the
    box, since TMA reads zeros beyond the edge and writes nothing there.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(
        tl.program_id(0),
        tiles_m * tiles_n,
        tl.num_programs(0),
        warp_specialize=WARP_SPECIALIZE,
    ):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        row0 = tile_m * BLOCK_M
        col0 = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, C, BLOCK_K):
            acc = dot(x.load([row0, k]), w.load([col0, k]).T, acc, PRECISION)
        _store_boxes(acc, scale, shift, residual, y, row0, col0, K, EPILOGUE)
