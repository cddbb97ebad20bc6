"""What a process holds for itself, as the operating system counts it.

Pages of files are left out: they are mostly the code of libraries, which all processes share and
the system may drop.
"""

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
    """Bytes of this process's own in memory now; None where the system does not tell."""
    return _without_files("VmRSS")


def peak() -> int | None:
    """The most bytes of its own since the process began, or since `reset_peak`; None as above.

    Files have as many pages in memory now as they had then, unless more were read in since.
    """
    return _without_files("VmHWM")


def reset_peak() -> bool:
    """Have `peak` begin anew with what is held now; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _without_files(key: str) -> int | None:
    all_pages, of_files = _status(key), _status("RssFile")
    return None if all_pages is None or of_files is None else all_pages - of_files


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


__all__ = ["give_back", "peak", "reset_peak", "resident"]
