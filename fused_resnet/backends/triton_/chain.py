"""A bottleneck from its 3x3 on, and the first 1x1 of the next one: three convolutions, one kernel.

    mid2     = relu(conv3x3(mid) * scale2 + shift2)              [pixels, M], stays on the chip
    out      = relu(mid2 @ w3 * scale3 + shift3 + residual)      [pixels, K], BLOCK_C at a time
    mid_next = relu(out @ w1 * scale1 + shift1)                  [pixels, NEXT], summed up over them

Data: activations dense in channels_last order; w2 [M, 3, 3, M], w3 [K, M], w1 [NEXT, K], wp
[K, PROJ]: all as channels_last weights lie; scale and shift fp32. Everything between load and store
is fp32, but for mid2 and out, which are rounded once as if they had been stored.

Schedule: one program per BLOCK_M pixels. The 3x3 is an implicit GEMM over nine taps without a
halo of its own, so nothing is computed twice. Its result is the left operand of all 1x1 products,
which are chained as the two GEMMs of attention are: each chunk of ``out`` is stored, and multiplied
at once. The sum over the chunks is the accumulator of mid_next.

Bytes: mid once, residual once, out once, mid_next once: M + K + K + NEXT channels a pixel, where
three fused convolutions read and write 3 M + 3 K (K = 4 M: 10 against 16 of M). The weights,
9 M^2 + M K + K NEXT, are read from L2 by every program.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .conv import accumulate
from .epilogue import affine_act, dot, round_to


@triton.jit
def _weights(w, row0, rows, col0, cols, LD: tl.constexpr, TMA: tl.constexpr):
    """Transposed block of a weight matrix [*, LD]: [columns, rows], by a descriptor with TMA."""
    if TMA:
        block = w.load([row0, col0]).T
    else:
        block = tl.load(w + (row0 + rows)[None, :] * LD + (col0 + cols)[:, None])
    return block


@triton.jit(do_not_specialize=["n", "h", "w_in", "oh", "ow", "rh", "rw"])
def chain_kernel(
    mid,
    residual,
    w2,
    scale2,
    shift2,
    w3,
    scale3,
    shift3,
    wp,
    scale_p,
    shift_p,
    w1,
    scale1,
    shift1,
    out,
    mid_next,
    n,
    h,
    w_in,
    oh,
    ow,
    rh,
    rw,
    M: tl.constexpr,
    K: tl.constexpr,
    NEXT: tl.constexpr,
    PROJ: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES_1: tl.constexpr,
    STAGES_2: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BLOCK_M output pixels; of one image with STORE ``pool``.

    mid [n, h, w_in, M]; residual [n, oh, ow, K], or with PROJ > 0 the input [n, rh, rw, PROJ] of a
    projection, sampled every STEP pixels; mid_next [n, oh, ow, NEXT], not written with NEXT 0.
    out with STORE ``all`` [n, oh, ow, K], ``even`` [n, ceil(oh / 2), ceil(ow / 2), K], ``pool``
    fp32 sums over the tile's pixels [n, tiles of oh * ow, K]. Grid (tiles).
    """
    if WIDE:
        n = n.to(tl.int64)
    if STORE == "pool":
        tiles = tl.cdiv(oh * ow, BLOCK_M)
        tile = tl.program_id(0)
        base = tile // tiles * (oh * ow)
        end = base + oh * ow
        rows = base + tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        if WIDE:
            rows = rows.to(tl.int64)
    else:
        end = n * oh * ow
        first_row = tl.program_id(0)
        if WIDE:
            first_row = first_row.to(tl.int64)
        rows = first_row * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < end
    cm = tl.arange(0, M)
    ks = tl.arange(0, BLOCK_K)
    cc = tl.arange(0, BLOCK_C)

    # The 3x3: window corner of each pixel, and which filter rows and columns lie inside the image.
    image = rows // (oh * ow)
    oy = (rows // ow - image * oh).to(tl.int32)
    ox = (rows % ow).to(tl.int32)
    iy = oy * STRIDE - 1
    ix = ox * STRIDE - 1
    valid = tl.zeros((BLOCK_M,), tl.int32)
    for tap in tl.static_range(3):
        valid |= ((iy + tap >= 0) & (iy + tap < h)).to(tl.int32) << tap
        valid |= ((ix + tap >= 0) & (ix + tap < w_in)).to(tl.int32) << (16 + tap)
    valid = tl.where(inside, valid, 0)
    corner = (image * h + iy) * w_in + ix
    windows = mid + corner[:, None] * M + ks[None, :]
    zeros = tl.zeros((BLOCK_M, M), tl.float32)
    acc = accumulate(
        windows, w2, 0, cm, valid, w_in, 0, 9 * (M // BLOCK_K), 0, M, zeros,
        M, M, 3, 1, 1, TMA, 9 * M, False, STAGES_1, "ieee",
    )  # fmt: skip
    mid2 = affine_act(acc, tl.load(scale2 + cm), tl.load(shift2 + cm), acc, "relu")
    mid2 = round_to(mid2, mid.dtype.element_ty)  # [BLOCK_M, M]

    # Where each pixel's residual is read and its result written.
    if PROJ > 0:
        cp = tl.arange(0, PROJ)
        at = ((image * rh + oy * STEP) * rw + ox * STEP) * PROJ
        x = tl.load(residual + at[:, None] + cp[None, :], mask=inside[:, None], other=0.0)
    if STORE == "even":
        hs = (oh + 1) // 2
        ws = (ow + 1) // 2
        stored = inside & (oy % 2 == 0) & (ox % 2 == 0)
        to = ((image * hs + oy // 2) * ws + ox // 2) * K
    else:
        stored = inside
        to = rows * K
    if NEXT > 0:
        cn = tl.arange(0, NEXT)
        acc_next = tl.zeros((BLOCK_M, NEXT), tl.float32)

    for c in tl.range(0, K, BLOCK_C, num_stages=STAGES_2):
        none = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        y = dot(mid2, _weights(w3, c, cc, 0, cm, M, TMA), none, "ieee")
        if PROJ > 0:
            r = dot(x, _weights(wp, c, cc, 0, cp, PROJ, TMA), none, "ieee")
            r = r * tl.load(scale_p + c + cc)[None, :] + tl.load(shift_p + c + cc)[None, :]
        else:
            r_at = residual + (rows * K)[:, None] + (c + cc)[None, :]
            r = tl.load(r_at, mask=inside[:, None], other=0.0).to(tl.float32)
        y = affine_act(y, tl.load(scale3 + c + cc), tl.load(shift3 + c + cc), r, "add_relu")
        o = round_to(y, mid.dtype.element_ty)  # [BLOCK_M, BLOCK_C]
        if STORE == "pool":
            total = tl.sum(tl.where(inside[:, None], o.to(tl.float32), 0.0), 0)
            tl.store(out + tl.program_id(0) * K + c + cc, total)
        else:
            tl.store(out + to[:, None] + (c + cc)[None, :], o, mask=stored[:, None])
        if NEXT > 0:
            acc_next = dot(o, _weights(w1, 0, cn, c, cc, K, TMA), acc_next, "ieee")

    if NEXT > 0:
        z = affine_act(acc_next, tl.load(scale1 + cn), tl.load(shift1 + cn), acc_next, "relu")
        z = round_to(z, mid.dtype.element_ty)
        tl.store(mid_next + (rows * NEXT)[:, None] + cn[None, :], z, mask=inside[:, None])
