"""Convolution on sm_90 by TMA im2col and warp specialisation, in Gluon: NEVER EXECUTED.

Gluon kernels do not run in Triton's interpreter and no GPU has run this one: a test compiles it
ahead of time, and nothing else. Only a user's own verification against float64 may admit it: a
tuner's (``im2col_kernel``); ``pytest -m gpu tests/test_triton_gpu.py -k gluon`` is another. For
sm_100 see ``im2col_sm100``.

TMA im2col keeps the flat order of output pixels: a box of it is BLOCK_M rows of the
[N*OH*OW, R*S*C] matrix at one filter tap, with zeros where the window leaves the image. So one warp
feeds a ring of (pixels, weights) buffers with no arithmetic per pixel, and the warps that multiply
only wait for it. y and the residual are plain [N*OH*OW, K] matrices whose ragged edge TMA clips.
"""

# ruff: noqa: RUF005 (Gluon knows no starred lists)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring; the phase flips when it wraps."""
    slot += 1
    wrapped = slot == SLOTS
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _load_tiles(
    x,
    w,
    xs,
    ws,
    free,
    full,
    m,
    C: gl.constexpr,
    K: gl.constexpr,
    OH: gl.constexpr,
    OW: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STRIDE: gl.constexpr,
    PAD: gl.constexpr,
):
    """One warp: keep the ring full, channels innermost, for every tile of this program."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    BLOCK_N: gl.constexpr = ws.shape[1]
    TILES_N: gl.constexpr = K // BLOCK_N
    slot, phase = 0, 1
    for tile in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * TILES_N, gl.num_programs(0)):
        col = tile % TILES_N * BLOCK_N
        row = tile // TILES_N * BLOCK_M
        ix = row % OW * STRIDE - PAD
        iy = row // OW % OH * STRIDE - PAD
        image = row // (OW * OH)
        depth = 0
        for r in range(R):
            for s in range(S):
                for c in range(0, C, BLOCK_K):
                    mbarrier.wait(free.index(slot), phase)
                    mbarrier.expect(full.index(slot), x.nbytes_per_cta + w.nbytes_per_cta)
                    tma.async_load_im2col(
                        x,
                        [image, iy, ix, c],
                        [r.to(gl.int16), s.to(gl.int16)],  # type: ignore[attr-defined]
                        full.index(slot),
                        xs.index(slot),
                    )
                    tma.async_load(w, [col, depth], full.index(slot), ws.index(slot))
                    depth += BLOCK_K
                    slot, phase = _advance(slot, phase, xs.shape[0])


@gluon.jit
def _store_columns(acc, out, part: gl.constexpr, scale, shift, row, col, y, EPILOGUE: gl.constexpr):
    """The epilogue, in column blocks as wide as y's box; ``out`` holds the residual already."""
    if acc.shape[1] > out.shape[2]:
        left, right = gl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))
        HALF: gl.constexpr = left.shape[1]
        _store_columns(left, out, part, scale, shift, row, col, y, EPILOGUE)
        _store_columns(
            right, out, part + HALF // out.shape[2], scale, shift, row, col + HALF, y, EPILOGUE
        )
    else:
        LAYOUT: gl.constexpr = acc.type.layout
        cols = col + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
        z = acc * gl.load(scale + cols)[None, :] + gl.load(shift + cols)[None, :]
        if EPILOGUE == "relu" or EPILOGUE == "relu_add_relu":
            z = gl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if EPILOGUE == "add" or EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
            z += out.index(part).load(LAYOUT).to(gl.float32)
        if EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
            z = gl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out.index(part).store(z.to(y.dtype))
        fence_async_shared()
        tma.async_store(y, [row, col], out.index(part))


@gluon.jit
def _multiply_tiles(
    residual,
    y,
    xs,
    ws,
    out,
    free,
    full,
    loaded,
    scale,
    shift,
    m,
    K: gl.constexpr,
    SLICES: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """The other warps: one wgmma group always in flight; the residual arrives meanwhile."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[1]
    PART: gl.constexpr = out.shape[2]
    TILES_N: gl.constexpr = K // BLOCK_N
    ADDS: gl.constexpr = EPILOGUE != "none" and EPILOGUE != "relu"
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    slot, phase, tile_phase = 0, 0, 0
    for tile in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * TILES_N, gl.num_programs(0)):
        col = tile % TILES_N * BLOCK_N
        row = tile // TILES_N * BLOCK_M
        tma.store_wait(0)  # the tile before has left ``out``
        if ADDS:
            mbarrier.expect(loaded, BLOCK_N // PART * residual.nbytes_per_cta)
            for part in gl.static_range(BLOCK_N // PART):
                tma.async_load(residual, [row, col + part * PART], loaded, out.index(part))
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
        before = 0
        for i in range(SLICES):
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(xs.index(slot), ws.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the group before is done: free its slot
            mbarrier.arrive(free.index(before), count=1, pred=i > 0)
            before = slot
            slot, phase = _advance(slot, phase, xs.shape[0])
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(before), count=1)
        if ADDS:
            mbarrier.wait(loaded, tile_phase)
            tile_phase ^= 1
        _store_columns(acc, out, 0, scale, shift, row, col, y, EPILOGUE)
    tma.store_wait(0)


@gluon.jit
def conv_im2col_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    y,
    m,
    C: gl.constexpr,
    K: gl.constexpr,
    OH: gl.constexpr,
    OW: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STRIDE: gl.constexpr,
    PAD: gl.constexpr,
    SLOTS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """Tiles of y, one after the other.

    x: im2col descriptor of [n, h, w, C], box (BLOCK_M, BLOCK_K); w: of [K, R*S*C], box (BLOCK_N,
    BLOCK_K); residual and y: of [m, K], box (BLOCK_M, part of BLOCK_N). C and K are multiples of
    the boxes. Grid (as many programs as run at once).
    """
    PARTS: gl.constexpr = w.block_shape[0] // y.block_shape[1]
    xs = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [SLOTS] + w.block_shape, w.layout)
    out = gl.allocate_shared_memory(y.dtype, [PARTS] + y.block_shape, y.layout)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(free.index(slot), count=1)
        mbarrier.init(full.index(slot), count=1)
    SLICES: gl.constexpr = R * S * C // x.block_shape[1]
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    residual,
                    y,
                    xs,
                    ws,
                    out,
                    free,
                    full,
                    loaded,
                    scale,
                    shift,
                    m,
                    K,
                    SLICES,
                    EPILOGUE,
                ),
            ),
            (_load_tiles, (x, w, xs, ws, free, full, m, C, K, OH, OW, R, S, STRIDE, PAD)),
        ],
        [1],
        [24],
    )
