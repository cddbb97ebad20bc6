"""Launches CUDA kernels on the CPU, from Python."""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .build import build_kernels, build_runtime
from .report import Report, parse_report

#: Who runs next: the thread made ready last (blocks ascending), first (blocks descending), or any.
SCHEDULES = ("depth_first", "fifo", "random")

#: Where a buffer lies in its pages: its end, or its beginning, against the guard.
PLACEMENTS = ("right", "left")

#: Limits of every GPU that the emulator stands for.
MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 << 10
MAX_GRID = (2**31 - 1, 65535, 65535)

_NUMBERS: dict[tuple[str, int], Any] = {
    ("i", 1): ctypes.c_int8,
    ("i", 2): ctypes.c_int16,
    ("i", 4): ctypes.c_int32,
    ("i", 8): ctypes.c_int64,
    ("u", 1): ctypes.c_uint8,
    ("u", 2): ctypes.c_uint16,
    ("u", 4): ctypes.c_uint32,
    ("u", 8): ctypes.c_uint64,
    ("f", 4): ctypes.c_float,
    ("f", 8): ctypes.c_double,
}


# The runtime executes one launch at a time.
_one_launch = threading.Lock()


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_runtime()))
    library.emulator_kernels.restype = ctypes.c_char_p
    library.emulator_create_buffer.restype = ctypes.c_void_p
    library.emulator_create_buffer.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.emulator_destroy_buffer.argtypes = [ctypes.c_void_p]
    library.emulator_destroy_buffer.restype = None
    library.emulator_protect_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.emulator_protect_buffer.restype = None
    library.emulator_buffer_address.argtypes = [ctypes.c_void_p]
    library.emulator_buffer_address.restype = ctypes.c_void_p
    library.emulator_launch.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_uint),
        ctypes.POINTER(ctypes.c_uint),
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_double,
    ]
    return library


def _memory(array: Any) -> tuple[int, int, int]:
    """(address, bytes, bytes of an element) of a dense numpy array or CPU tensor."""
    if isinstance(array, np.ndarray):
        if not array.flags.c_contiguous:
            raise ValueError("an array must be C-contiguous")
        return array.ctypes.data, array.nbytes, array.itemsize
    if array.device.type != "cpu" or not array.is_contiguous():
        raise ValueError("a tensor must be on the CPU and contiguous; permute it first")
    return array.data_ptr(), array.numel() * array.element_size(), array.element_size()


class Buffer:
    """Global memory between guard pages, with the contents, shape and dtype of an array or tensor.

    It lives until it is closed, so it can hold what one kernel writes and the next one reads. In a
    launch it is read-only where the kernel's parameter points to const; one whose ``address`` is
    passed inside a structure is as ``protect`` left it.

    Args:
        array: Dense numpy array or CPU tensor.
        name: What reports call it.
        initialised: False poisons it with NaN; the checked build then reports reads before writes.
        placement: Which end lies against the guard: "right" finds overruns, "left" underruns.
        alignment: Of the address. More than the size of an element may leave a few bytes between
            the end and the guard: there the fast build sees writes, the checked build everything.
    """

    def __init__(
        self,
        array: Any,
        *,
        name: str = "buffer",
        initialised: bool = True,
        placement: str = "right",
        alignment: int = 16,
    ) -> None:
        address, self.bytes, element_bytes = _memory(array)
        self.name = name
        self._array = array
        left = PLACEMENTS.index(placement)
        source = address if initialised else None
        self._handle = _runtime().emulator_create_buffer(
            name.encode(), source, self.bytes, element_bytes, alignment, left, 1
        )
        self.address: int = _runtime().emulator_buffer_address(self._handle)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back."""
        if self._handle is not None:
            _runtime().emulator_destroy_buffer(self._handle)
            self._handle = None

    def protect(self, writable: bool) -> None:
        """Decides whether kernels may write it."""
        _runtime().emulator_protect_buffer(self._handle, int(writable))

    def copy_to(self, array: Any) -> None:
        """Copies the contents to a dense array or tensor of the same size."""
        address, size, _ = _memory(array)
        if size != self.bytes:
            raise ValueError(f"{self.name} has {self.bytes} bytes, the array {size}")
        ctypes.memmove(address, self.address, size)

    def read(self) -> Any:
        """A new array or tensor with the contents."""
        like = self._array
        copy = np.empty_like(like) if isinstance(like, np.ndarray) else like.clone()
        self.copy_to(copy)
        return copy


class Output:
    """An array that a kernel must write and not read: poisoned with NaN before the launch."""

    def __init__(self, array: Any) -> None:
        self.array = array


class Emulator:
    """A library of kernels and the means to launch them.

    Args:
        sources: Translation units that register kernels with ``EMULATOR_KERNEL``.
        checked: Build with every memory access checked and counted, or fast.
        include: Directories for the sources' ``#include``.

    Example:
        >>> emulator = Emulator([Path("kernels.cpp")], checked=True)
        >>> report = emulator.launch("row_sum", {"x": x, "y": Output(y), "columns": 100},
        ...                          grid=7, block=128)
        >>> report.raise_findings()
    """

    def __init__(
        self, sources: Sequence[Path], *, checked: bool, include: Sequence[Path] = ()
    ) -> None:
        runtime = _runtime()
        before = len(json.loads(runtime.emulator_kernels()))
        self.library = build_kernels(sources, checked=checked, include=include)
        self._handle = ctypes.CDLL(str(self.library))
        self.checked = checked
        registered = json.loads(runtime.emulator_kernels())
        self._kernels = {
            k["name"]: (i, k["parameters"]) for i, k in enumerate(registered) if i >= before
        }

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels."""
        return tuple(self._kernels)

    def launch(
        self,
        kernel: str,
        arguments: Mapping[str, Any],
        *,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        shared_bytes: int = 0,
        schedule: str = "depth_first",
        seed: int = 0,
        placement: str = "right",
        alignment: int = 16,
        max_shared_bytes: int = MAX_SHARED_BYTES,
        cpu_seconds: float = 300,
    ) -> Report:
        """Executes a kernel; arrays that it may write are written.

        Args:
            kernel: Its registered name.
            arguments: Name and value of each parameter, in order. A pointer takes a ``Buffer``, an
                array or tensor (copied into a guarded buffer, and back if it is not const), an
                ``Output``, or None; a number a number; a structure a ``ctypes.Structure``.
            grid: Blocks.
            block: Threads.
            shared_bytes: Dynamic shared memory.
            schedule: One of ``SCHEDULES``.
            seed: Of the random schedule.
            placement: One of ``PLACEMENTS``, for temporary buffers and dynamic shared memory.
            alignment: Of temporary buffers.
            max_shared_bytes: What the GPU has: 99 KiB on sm_86, sm_89 and sm_120, 163 KiB on sm_80.
            cpu_seconds: Time limit; what exceeds it is reported as a loop that does not end.

        Raises:
            ValueError: Unknown kernel, wrong arguments, or a launch that CUDA refuses.
        """
        if kernel not in self._kernels:
            raise ValueError(f"no kernel {kernel!r}; there are {', '.join(self._kernels)}")
        number, parameters = self._kernels[kernel]
        extents = _extents(grid), _extents(block)
        _check_launch(*extents, shared_bytes, max_shared_bytes)
        if len(arguments) != len(parameters):
            raise ValueError(f"{kernel} has {len(parameters)} parameters, got {list(arguments)}")

        temporary: list[tuple[Buffer, Any]] = []
        values = []
        writable: dict[Buffer, bool] = {}
        try:
            for (name, value), (kind, size) in zip(arguments.items(), parameters, strict=True):
                if kind in "rw" and value is not None:
                    if not isinstance(value, Buffer):
                        array = value.array if isinstance(value, Output) else value
                        value = Buffer(
                            array,
                            name=name,
                            initialised=not isinstance(value, Output),
                            placement=placement,
                            alignment=alignment,
                        )
                        temporary.append((value, array if kind == "w" else None))
                    writable[value] = writable.get(value, False) or kind == "w"
                values.append(_value(name, value, kind, size))
            for buffer, is_writable in writable.items():
                buffer.protect(is_writable)
            pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
            with _one_launch:
                answer = _runtime().emulator_launch(
                    number,
                    pointers,
                    (ctypes.c_uint * 3)(*extents[0]),
                    (ctypes.c_uint * 3)(*extents[1]),
                    shared_bytes,
                    SCHEDULES.index(schedule),
                    seed,
                    PLACEMENTS.index(placement),
                    cpu_seconds,
                )
            for buffer, array in temporary:
                if array is not None:
                    buffer.copy_to(array)
        finally:
            for buffer, _ in temporary:
                buffer.close()
        report = parse_report(kernel, self.library, json.loads(answer))
        static_bytes = report.counters["static_shared_bytes"]
        if static_bytes + shared_bytes > max_shared_bytes:
            raise ValueError(
                f"{static_bytes} + {shared_bytes} bytes of shared memory, over {max_shared_bytes}"
            )
        return report


def _extents(extent: int | tuple[int, ...]) -> tuple[int, int, int]:
    given = (extent,) if isinstance(extent, int) else extent
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def _check_launch(
    grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, max_shared: int
) -> None:
    if min(grid) < 1 or any(g > limit for g, limit in zip(grid, MAX_GRID, strict=True)):
        raise ValueError(f"grid {grid} is not within 1 and {MAX_GRID}")
    if min(block) < 1 or block[2] > 64 or block[0] * block[1] * block[2] > MAX_THREADS:
        raise ValueError(f"block {block} is not within 1 and {MAX_THREADS} threads")
    if shared > max_shared:
        raise ValueError(f"{shared} bytes of dynamic shared memory, over {max_shared}")


def _value(name: str, value: Any, kind: str, size: int) -> Any:
    """The argument as the C value that the kernel's parameter has."""
    if kind in "rw":
        return ctypes.c_void_p(None if value is None else value.address)
    if kind == "s":
        if not isinstance(value, ctypes.Structure) or ctypes.sizeof(value) != size:
            raise ValueError(f"{name} must be a ctypes.Structure of {size} bytes, got {value!r}")
        return value
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return _NUMBERS[kind, size](value)
