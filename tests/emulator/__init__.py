"""CUDA C++ kernels executed, and checked, on the CPU. See README.md."""

from .build import BuildError
from .driver import PLACEMENTS, SCHEDULES, Buffer, Emulator, Output
from .report import BufferTraffic, Finding, Instruction, KernelError, Place, Report

__all__ = [
    "PLACEMENTS",
    "SCHEDULES",
    "Buffer",
    "BufferTraffic",
    "BuildError",
    "Emulator",
    "Finding",
    "Instruction",
    "KernelError",
    "Output",
    "Place",
    "Report",
]
