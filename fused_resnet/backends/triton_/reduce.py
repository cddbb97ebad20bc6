"""Second half of a convolution whose reduction was split: sum the parts, then the epilogue.

    y[M, K] = epilogue(sum over z of partial[z, M, K])

The sum runs over z in order, so results repeat bit by bit.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_tile


@triton.jit(do_not_specialize=["m"])
def reduce_kernel(
    partial,
    scale,
    shift,
    residual,
    y,
    m,
    K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile; partial fp32 [SPLIT_K, m, K], residual and y [m, K]. Grid (tiles of m, of K)."""
    if WIDE:
        m = m.to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = tl.program_id(1) * BLOCK_N
    cols = col0 + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (cols < K)[None, :]
    # K as the row stride of a matrix of SPLIT_K * m rows.
    offsets = rows.to(m.dtype)[:, None] * K + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for z in tl.static_range(SPLIT_K):
        acc += tl.load(partial + z * m * K + offsets, mask=inside, other=0.0)
    store_tile(
        acc,
        scale,
        shift,
        residual,
        y,
        rows.to(m.dtype),
        m,
        col0,
        K,
        K,
        K % BLOCK_N == 0,
        EPILOGUE,
        1,
    )
