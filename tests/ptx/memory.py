"""State spaces: byte arrays in which every access is checked for bounds and alignment.

Global memory is a set of buffers with gaps between them. Shared and local memory have one copy per
block or thread. An address that no buffer holds, or that is not a multiple of the access's size,
is an error, never a silent neighbour.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from .parse import PtxError, Variable

Array = Any

#: Shared and local addresses start here, so that address 0 is always wrong.
BASE = 1024
#: Where generic addresses see shared and local memory; global addresses are generic as they are.
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57
PARAM_WINDOW = 1 << 58
_GLOBAL_BASE = 1 << 40
_GAP = 4096


class AccessError(Exception):
    """An access out of bounds or misaligned; ``lane`` is its position among the lanes asked."""

    def __init__(self, message: str, lane: int) -> None:
        super().__init__(message)
        self.lane = lane


class GlobalMemory:
    """Buffers at addresses of their own; arrays are copied in, and out again by ``write_back``."""

    def __init__(self, arrays: list[Array], variables: list[Variable]) -> None:
        self.arrays: list[tuple[Array, int]] = []
        self.addresses: dict[str, int] = {}
        starts, ends, offset = [], [], _GAP
        pieces: list[tuple[int, Array]] = []
        seen: dict[tuple[int, int], int] = {}
        self.address_of: list[int] = []
        for array in arrays:
            key = (array.__array_interface__["data"][0], array.nbytes)
            if key not in seen:
                seen[key] = offset
                pieces.append((offset, _bytes_of(array)))
                self.arrays.append((array, offset))
                starts.append(offset)
                ends.append(offset + array.nbytes)
                offset = _next(offset + array.nbytes)
            self.address_of.append(_GLOBAL_BASE + seen[key])
        for v in variables:
            size = v.size or 0
            self.addresses[v.name] = _GLOBAL_BASE + offset
            data = np.zeros(size, np.uint8)
            data[: len(v.data)] = np.frombuffer(v.data, np.uint8)
            pieces.append((offset, data))
            starts.append(offset)
            ends.append(offset + size)
            offset = _next(offset + size)
        _no_overlap(arrays)
        # Buffers start 256 bytes aligned, as cudaMalloc's do; the tail pads wide views.
        self.bytes = np.zeros(offset + 256, np.uint8)
        for start, data in pieces:
            self.bytes[start : start + data.size] = data
        self.starts, self.ends = np.array(starts, np.int64), np.array(ends, np.int64)

    def locate(self, addresses: Array, size: int, _: Array | None = None) -> Array:
        """Byte offsets into ``bytes`` of accesses of ``size`` bytes."""
        offsets = addresses - _GLOBAL_BASE
        which = np.searchsorted(self.starts, offsets, "right") - 1
        if self.starts.size:
            bad = (which < 0) | (offsets + size > self.ends[which])
        else:
            bad = np.ones(offsets.shape, bool)
        _refuse(bad, offsets, size, "global", addresses)
        return offsets

    def write_back(self) -> None:
        """Copy the buffers to the arrays that they came from."""
        for array, offset in self.arrays:
            if array.flags.writeable:
                flat = self.bytes[offset : offset + array.nbytes]
                array[...] = flat.view(array.dtype).reshape(array.shape)


class PerUnit:
    """Memory of which every unit (a block, a thread) has ``size`` bytes of its own."""

    def __init__(self, name: str, units: int, size: int, fill: int) -> None:
        self.name, self.size = name, size
        self.stride = -(-size // 256) * 256
        self.bytes = np.full(units * self.stride + 256, fill, np.uint8)

    def locate(self, addresses: Array, size: int, units: Array) -> Array:
        """Byte offsets into ``bytes`` of accesses by ``units`` at their own addresses."""
        offsets = addresses - BASE
        bad = (offsets < 0) | (offsets + size > self.size)
        _refuse(bad, offsets, size, f"{self.name} ({self.size} bytes)", offsets)
        return offsets + units * self.stride


def layout(variables: list[Variable], dynamic: int) -> tuple[dict[str, int], int]:
    """Addresses of the variables of a per-unit space, and the bytes they need.

    Variables of no size (dynamic shared memory) all start behind the others.
    """
    addresses, top = {}, 0
    for v in variables:
        if v.size is not None:
            top = -(-top // v.align) * v.align
            addresses[v.name] = BASE + top
            top += v.size
    unsized = [v for v in variables if v.size is None]
    if unsized:
        align = max(v.align for v in unsized)
        top = -(-top // align) * align
        addresses |= {v.name: BASE + top for v in unsized}
    return addresses, top + dynamic


def _bytes_of(array: Array) -> Array:
    if not array.flags.c_contiguous:
        raise PtxError(f"buffers must be C-contiguous; this one has strides {array.strides}")
    return array.reshape(-1).view(np.uint8)


def _next(offset: int) -> int:
    return -(-(offset + _GAP) // 256) * 256


def _no_overlap(arrays: list[Array]) -> None:
    spans = sorted({(a.__array_interface__["data"][0], a.nbytes) for a in arrays if a.nbytes})
    for (start, size), (following, _) in itertools.pairwise(spans):
        if start + size > following:
            raise PtxError("two buffers overlap; pass one array and Pointer(array, offset)")


def _refuse(bad: Array, offsets: Array, size: int, name: str, addresses: Array) -> None:
    misaligned = offsets % size != 0
    if misaligned.any():
        lane = int(misaligned.argmax())
        raise AccessError(
            f"{name} address {int(addresses[lane]):#x} is not a multiple of {size}", lane
        )
    if bad.any():
        lane = int(bad.argmax())
        raise AccessError(
            f"{size} bytes at {name} address {int(addresses[lane]):#x} are out of bounds", lane
        )
