"""A textbook GEMM in Triton: what ahead-of-time compilation, the certifier and PTX runner try."""

import triton
import triton.language as tl


@triton.jit
def gemm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[M, N] = a[M, K] @ b[K, N], row-major, any sizes; one block per [BM, BN] tile."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a_mask = (rows[:, None] < M) & ((k + inner)[None, :] < K)
        b_mask = ((k + inner)[:, None] < K) & (cols[None, :] < N)
        x = tl.load(a + rows[:, None] * K + (k + inner)[None, :], mask=a_mask, other=0.0)
        y = tl.load(b + (k + inner)[:, None] * N + cols[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(x, y, acc)
    c_mask = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(c + rows[:, None] * N + cols[None, :], acc.to(c.dtype.element_ty), mask=c_mask)
