"""The convolution of ``im2col`` on sm_100, by tcgen05 and tensor memory, in Gluon: NEVER EXECUTED.

As for ``im2col``, a test compiles it ahead of time, and nothing else: Gluon kernels do not run in
Triton's interpreter, no GPU has run this one, and only a tuner may admit it (``im2col_kernel``).

What it has over ``boxes``: a tile is any 128 pixels in a row, so that no image size leaves boxes
half empty, and a warp of its own loads while tensor memory holds the sums of two tiles.

Three roles. One warp loads, as on sm_90. One warp issues the products: they are asynchronous, and
their completion frees the slot of the ring or publishes the sum. The others finish tiles. Sums lie
in tensor memory, two of them, so that a tile is finished while the next one is multiplied.
"""

# ruff: noqa: RUF005 (Gluon knows no starred lists)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    tcgen05_commit,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .im2col import _advance, _load_tiles


@gluon.jit
def _multiply_tiles(
    xs, ws, sums, free, full, drained, summed, m, K: gl.constexpr, SLICES: gl.constexpr
):
    """One warp: a product for each slot of the ring, into the sum that is not being read."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[1]
    TILES_N: gl.constexpr = K // BLOCK_N
    slot, phase, at, at_phase = 0, 0, 0, 1
    for _ in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * TILES_N, gl.num_programs(0)):
        mbarrier.wait(drained.index(at), at_phase)
        for i in range(SLICES):
            mbarrier.wait(full.index(slot), phase)
            tcgen05_mma(
                xs.index(slot),
                ws.index(slot).permute((1, 0)),
                sums.index(at),
                use_acc=i > 0,
                mbarriers=[free.index(slot)],
            )
            slot, phase = _advance(slot, phase, xs.shape[0])
        tcgen05_commit(summed.index(at))
        at, at_phase = _advance(at, at_phase, 2)


@gluon.jit
def _store_columns(
    acc, out, residual, y, loaded, phase, scale, shift, row, col, EPILOGUE: gl.constexpr
):
    """As many columns of a sum as y's box has: epilogue, staging tile ``out``, TMA."""
    LAYOUT: gl.constexpr = acc.get_reg_layout()
    ADDS: gl.constexpr = EPILOGUE != "none" and EPILOGUE != "relu"
    tma.store_wait(1)  # the store before the last has left ``out``: there are two, used in turn
    if ADDS:
        mbarrier.expect(loaded, residual.nbytes_per_cta)
        tma.async_load(residual, [row, col], loaded, out)
    cols = col + gl.arange(0, out.shape[1], gl.SliceLayout(0, LAYOUT))
    z = acc.load(LAYOUT) * gl.load(scale + cols)[None, :] + gl.load(shift + cols)[None, :]
    if EPILOGUE == "relu" or EPILOGUE == "relu_add_relu":
        z = gl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ADDS:
        mbarrier.wait(loaded, phase)
        z += out.load(LAYOUT).to(gl.float32)
    if EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
        z = gl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out.store(z.to(y.dtype))
    fence_async_shared()
    tma.async_store(y, [row, col], out)


@gluon.jit
def _finish_tiles(
    residual,
    y,
    sums,
    out,
    drained,
    summed,
    loaded,
    scale,
    shift,
    m,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """The other warps: columns of a sum from tensor memory, a box of y at a time."""
    PART: gl.constexpr = out.shape[2]
    TILES_N: gl.constexpr = K // BLOCK_N
    at, at_phase, part_phase = 0, 0, 0
    for tile in range(gl.program_id(0), gl.cdiv(m, BLOCK_M) * TILES_N, gl.num_programs(0)):
        col = tile % TILES_N * BLOCK_N
        row = tile // TILES_N * BLOCK_M
        mbarrier.wait(summed.index(at), at_phase)
        for part in gl.static_range(BLOCK_N // PART):
            _store_columns(
                sums.index(at).slice(part * PART, PART),
                out.index(part % 2),
                residual,
                y,
                loaded,
                part_phase,
                scale,
                shift,
                row,
                col + part * PART,
                EPILOGUE,
            )
            part_phase ^= 1
        mbarrier.arrive(drained.index(at), count=1)
        at, at_phase = _advance(at, at_phase, 2)
    tma.store_wait(0)


@gluon.jit
def conv_im2col_sm100_kernel(
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
    """Tiles of y, one after the other; arguments and grid are those of ``conv_im2col_kernel``.

    BLOCK_M is 128 (tensor memory has as many lanes); y's box divides BLOCK_N at least in two, since
    the staging tiles take turns.
    """
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_N: gl.constexpr = w.block_shape[0]
    xs = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [SLOTS] + w.block_shape, w.layout)
    out = gl.allocate_shared_memory(y.dtype, [2] + y.block_shape, y.layout)
    sums = allocate_tensor_memory(
        gl.float32,
        [2, BLOCK_M, BLOCK_N],
        TensorMemoryLayout(block=(BLOCK_M, BLOCK_N), col_stride=1),
    )
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(free.index(slot), count=1)
        mbarrier.init(full.index(slot), count=1)
    for at in gl.static_range(2):
        mbarrier.init(drained.index(at), count=1)
        mbarrier.init(summed.index(at), count=1)
    SLICES: gl.constexpr = R * S * C // x.block_shape[1]
    gl.warp_specialize(
        [
            (
                _finish_tiles,
                (
                    residual,
                    y,
                    sums,
                    out,
                    drained,
                    summed,
                    loaded,
                    scale,
                    shift,
                    m,
                    K,
                    BLOCK_M,
                    BLOCK_N,
                    EPILOGUE,
                ),
            ),
            (_multiply_tiles, (xs, ws, sums, free, full, drained, summed, m, K, SLICES)),
            (_load_tiles, (x, w, xs, ws, free, full, m, C, K, OH, OW, R, S, STRIDE, PAD)),
        ],
        [1, 1],
        [24, 24],
    )
