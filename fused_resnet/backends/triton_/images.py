"""What happens to images and features around the convolutions: memory-bound kernels, one pass each.

``pad_kernel``   any [N, C, H, W] view, any dtype (uint8 too) -> channels_last with CP >= C channels
and a
                 zero border, cast, and normalised by a per-channel factor and offset: the input of
                 a network, or of a convolution of few channels.
``mean_kernel``  global average pool, [N, H*W, C] -> [N, C].
``add_relu_kernel``  relu(a + b) of two flat arrays.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import relu, round_to


@triton.jit(
    do_not_specialize=[
        "pixels", "h", "w", "hp", "wp", "top", "left",
        "stride_n", "stride_c", "stride_h", "stride_w",
    ]
)  # fmt: skip
def pad_kernel(
    x,
    factor,
    offset,
    y,
    pixels,
    h,
    w,
    hp,
    wp,
    top,
    left,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    CP: tl.constexpr,
    TILE_C: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Copy x [n, C, h, w] of any strides to y [n, hp, wp, CP], x's pixel (0, 0) at (top, left).

    y = x * factor + offset per channel (fp32) with NORMALISE, x otherwise; zero in the border and
    in channels from C on. ``pixels`` = n * hp * wp. Grid (blocks of BLOCK pixels times tiles of
    TILE_C channels).
    """
    TILES: tl.constexpr = (CP + TILE_C - 1) // TILE_C
    block = tl.program_id(0) // TILES
    if WIDE:
        block = block.to(tl.int64)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) % TILES * TILE_C + tl.arange(0, TILE_C)
    image = pixel // (hp * wp)
    iy = pixel // wp % hp - top
    ix = pixel % wp - left
    inside = (pixel < pixels) & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w)
    inside = inside[:, None] & (c < C)[None, :]
    if WIDE:
        c = c.to(tl.int64)
    at = (image * stride_n + iy * stride_h + ix * stride_w)[:, None] + (c * stride_c)[None, :]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if NORMALISE:
        f = tl.load(factor + c, mask=c < C, other=0.0)
        o = tl.load(offset + c, mask=c < C, other=0.0)
        # The border is zero after the normalisation, as a convolution's padding is.
        value = tl.where(inside, value * f[None, :] + o[None, :], 0.0)
    to = pixel[:, None] * CP + c[None, :]
    mask = (pixel < pixels)[:, None] & (c < CP)[None, :]
    tl.store(y + to, round_to(value, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def mean_kernel(
    x, y, pixels, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr
):
    """Mean over pixels, summed in fp32: x [n, pixels, C] -> y [n, C]. Grid (n, tiles of C)."""
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    x += image * pixels * C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        at = (first + p)[:, None] * C + c[None, :]
        mask = (first + p < pixels)[:, None] & (c < C)[None, :]
        total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / pixels
    tl.store(y + image * C + c, round_to(mean, y.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["units"])
def add_relu_kernel(a, b, y, units, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Compute y = relu(a + b) over flat arrays of ``units`` * UNIT elements; y may be a.

    The mask is the same for UNIT neighbours, so that accesses are as wide. Grid (blocks).
    """
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
        units = units.to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < units * UNIT
    z = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    # The sum of two values of one dtype is rounded as torch rounds it, before the ReLU; that ReLU
    # is exact, so one rounding at the end is the same.
    z += tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, round_to(relu(z), y.dtype.element_ty), mask=mask)
