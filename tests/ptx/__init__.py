"""A functional PTX runner: what nvcc and Triton emitted, executed on the CPU with numpy.

    module = load(ptx_text)
    module["gemm"].run(grid=(2, 2), block=128, args=[a, b, c, 128, 96, 112], shared_bytes=32768)

Every thread is a lane of numpy arrays, so a 128x128 GEMM tile takes about a second. It proves that
the compiled kernel computes what its source promises, for one legal order of execution: every
access is checked for bounds and alignment, memory that was not written reads as NaN, asynchronous
copies land only when they are waited for, barriers and warp-wide instructions wait for all their
lanes, and an instruction that is not implemented is an error that names it.

What it does not show: races (the CUDA emulator does), timing, the memory model, the last bits of
``.approx`` functions and of sums inside mma. Thread-block clusters, mbarrier, TMA, wgmma and
tcgen05 are not implemented, so kernels for sm_80, 86 and 89 run, and those of others that keep to
their instructions.
"""

from .parse import PtxError
from .runner import Kernel, Module, Pointer, load

__all__ = ["Kernel", "Module", "Pointer", "PtxError", "load"]
