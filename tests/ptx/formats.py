"""Exact rounding between floating-point formats, vectorised with numpy.

Sums and fused products are first rounded to *odd* in float64, which makes the second rounding, to
float32 or less, the only one that counts (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def fma_odd(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of values that fit float32, in float64 rounded to odd."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    return _to_odd(total, error)


def odd_f32(x: Array) -> Array:
    """float64 to float32, rounded to odd."""
    x = np.asarray(x, np.float64)
    y = np.asarray(x.astype(np.float32))
    # An overflow is left at infinity: every format that follows overflows there too.
    return _to_odd(y, x - y.astype(np.float64))


def _to_odd(nearest: Array, error: Array) -> Array:
    """The odd one of the two neighbours of ``nearest + error``; ``nearest`` where it is exact."""
    bits = nearest.view(np.int64 if nearest.dtype == np.float64 else np.int32)
    wrong = np.isfinite(nearest) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    if not wrong.any():
        return nearest
    # Bits of floats grow with their magnitude; zero has no error and is never moved from.
    step = np.where((error > 0) == (nearest > 0), 1, -1).astype(bits.dtype)
    return np.asarray(np.where(wrong, bits + step, bits)).view(nearest.dtype)


def f32_of(x: Array, mode: str = "rn") -> Array:
    """float64 (exact, or rounded to odd) to float32 by rounding mode rn, rz, rm or rp."""
    x = np.asarray(x, np.float64)
    y = np.asarray(x.astype(np.float32))
    if mode == "rn":
        return y
    return _directed(y, x, y.astype(np.float64), mode, np.int32)


def f16_of(x: Array, mode: str = "rn") -> Array:
    """float64 (exact, or rounded to odd) to the bits of float16 by rounding mode."""
    x = np.asarray(x, np.float64)
    y = np.asarray(x.astype(np.float16))
    if mode == "rn":
        return y.view(np.uint16)
    return _directed(y, x, y.astype(np.float64), mode, np.int16).view(np.uint16)


def bf16_of(x: Array, mode: str = "rn") -> Array:
    """float64 (exact, or rounded to odd) to the bits of bfloat16 by rounding mode rn or rz."""
    x = np.asarray(x)
    bits = (x if x.dtype == np.float32 else odd_f32(x)).view(np.uint32)
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    elif mode == "rz":
        rounded = bits
    else:
        raise ValueError(f"rounding mode {mode} to bf16")
    return np.where(np.isnan(x), np.uint16(0x7FFF), (rounded >> np.uint32(16)).astype(np.uint16))


def _directed(y: Array, x: Array, back: Array, mode: str, kind: type) -> Array:
    """``y``, the nearest to ``x``, moved one step where the mode asks for the other neighbour."""
    too_high, too_low = back > x, back < x
    if mode == "rz":
        inward = (too_high & (x > 0)) | (too_low & (x < 0))
        return (y.view(kind) - inward.astype(kind)).view(y.dtype)
    if mode == "rm":
        return np.where(too_high, np.nextafter(y, y.dtype.type(-np.inf)), y)
    if mode == "rp":
        return np.where(too_low, np.nextafter(y, y.dtype.type(np.inf)), y)
    raise ValueError(f"rounding mode {mode}")


def bf16_to_f32(bits: Array) -> Array:
    """The values of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_to_f32(bits: Array) -> Array:
    """The values of float16 bits."""
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def tf32_of(x: Array, mode: str) -> Array:
    """float32 to TF32 (10 bits of mantissa): to nearest (rna: ties away, rn: even) or cut (rz)."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    if mode == "rna":
        rounded = bits + np.uint32(0x1000)
    elif mode == "rn":
        rounded = bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    elif mode == "rz":
        rounded = bits
    else:
        raise ValueError(f"rounding mode {mode} to tf32")
    finite = np.isfinite(x)
    return np.where(finite, rounded & np.uint32(0xFFFFE000), bits).view(np.float32)


def flush(x: Array) -> Array:
    """float32 with subnormal values replaced by zeros of their sign (``.ftz``)."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x).astype(np.float32)
