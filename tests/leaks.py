"""What calls leave allocated, counted rather than read from the size of the process."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import pytest


class MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


needs_mallinfo = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc of 2.33 or later"
)


def left_by(call: Callable[[], object], calls: int = 1000) -> float:
    """Bytes a call that stay allocated: of malloc, and 64 for each block of Python's own heap.

    The smallest of some rounds, since threads of libraries may allocate beside: a leak is in each.
    """

    def growth(count: int) -> int:
        gc.collect()
        before = _allocated()
        for _ in range(count):
            call()
        gc.collect()
        return _allocated() - before

    growth(calls // 10)
    return min(growth(calls) for _ in range(3)) / calls


def _allocated() -> int:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd) + 64 * sys.getallocatedblocks()
