"""What a process holds, as the operating system counts it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any


def give_back() -> None:
    """Return freed memory to the system: C's allocator keeps it for later, and so it counts.

    Does nothing where the C library has no ``malloc_trim``, which is glibc's.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    found: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def resident() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    return _status("VmRSS")


def peak() -> int | None:
    """The most bytes in memory since the process began, or since `reset_peak`; None as above."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Have `peak` begin anew with what is held now; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


__all__ = ["give_back", "peak", "reset_peak", "resident"]
