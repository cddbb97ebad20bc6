"""Limits and rates of one streaming multiprocessor (SM), per compute capability.

Limits (exact) are those of NVIDIA's CUDA C++ Programming Guide 13.0, table "Technical
Specifications per Compute Capability", and of ``cuda_occupancy.h`` of the CUDA 13.0 toolkit
(allocation granularities, blocks per SM, the 1 KiB that the system reserves of each block).

Rates follow from NVIDIA's published dense peaks, ``peak = SMs * clock * 2 * FMA per clock``:

=======  ============================  ====================================================
sm       FMA/clock/SM 16-bit, TF32     source of the peak
=======  ============================  ====================================================
75       512, none                     T4 datasheet: 65 TFLOP/s, 40 SMs, 1.59 GHz
80       1024, 512                     A100 whitepaper: 312 and 156 TFLOP/s, 108 SMs, 1.41 GHz
86       512, 256                      A10 datasheet: 125 and 62.5 TFLOP/s, 72 SMs, 1.695 GHz
89       512, 256                      L40S datasheet: 362 and 183 TFLOP/s, 142 SMs, 2.52 GHz
90       2048, 1024                    H100 SXM whitepaper: 989 and 494 TFLOP/s, 132 SMs, 1.83 GHz
100      4096, 2048                    B200 datasheet: 2.25 and 1.1 PFLOP/s, 148 SMs, 1.85 GHz
120      512, 256                      RTX PRO 6000: 504 TFLOP/s, 188 SMs, 2.62 GHz
=======  ============================  ====================================================

GeForce parts of sm_86, 89 and 120 run 16-bit products with fp32 accumulation at half of this. A
slower tensor unit is easier to keep busy, so the figures here are the demanding ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """What one SM of a compute capability holds and how fast its pipes are.

    Sizes are in bytes unless named otherwise. ``tensor_f16``, ``tensor_tf32`` and ``fp32`` are
    fused multiply-adds per clock and SM. ``mma_sync_fraction`` is the part of the tensor rate that
    the warp-synchronous ``mma.sync`` reaches.
    """

    sm: int
    max_warps: int
    max_blocks: int
    shared_per_sm: int
    shared_per_block: int
    shared_granularity: int
    shared_reserved: int
    tensor_f16: int
    tensor_tf32: int
    fp32: int
    mma_sync_fraction: float = 1.0

    #: The same for every capability in the table.
    registers_per_sm: int = 65536
    max_registers: int = 255
    register_granularity: int = 256
    partitions: int = 4
    max_threads_per_block: int = 1024
    #: Bytes that shared memory and L1 move per clock (32 banks of 4 bytes; Programming Guide).
    shared_bytes_per_clock: int = 128


_KIB = 1024

_ARCHS = {
    a.sm: a
    for a in (
        Arch(75, 32, 16, 64 * _KIB, 64 * _KIB, 256, 0, 512, 0, 64),
        Arch(80, 64, 32, 164 * _KIB, 163 * _KIB, 128, _KIB, 1024, 512, 64),
        Arch(86, 48, 16, 100 * _KIB, 99 * _KIB, 128, _KIB, 512, 256, 128),
        Arch(89, 48, 24, 100 * _KIB, 99 * _KIB, 128, _KIB, 512, 256, 128),
        # mma.sync on sm_90 reaches 62 % of wgmma's rate in the microbenchmarks of Luo et al.,
        # arXiv:2402.13499 (a measurement of others, taken over here as the model's constant).
        Arch(90, 64, 32, 228 * _KIB, 227 * _KIB, 128, _KIB, 2048, 1024, 128, 0.62),
        # Assumption: sm_100 keeps the absolute mma.sync rate of sm_80, a quarter of tcgen05's.
        Arch(100, 64, 32, 228 * _KIB, 227 * _KIB, 128, _KIB, 4096, 2048, 128, 0.25),
        Arch(120, 48, 24, 100 * _KIB, 99 * _KIB, 128, _KIB, 512, 256, 128),
    )
}

#: The capabilities in the table.
ARCHS: tuple[int, ...] = tuple(_ARCHS)


def arch(sm: int) -> Arch:
    """The table's entry for a compute capability such as 80.

    Raises:
        ValueError: the capability is not in the table; none is guessed from its neighbours.
    """
    try:
        return _ARCHS[sm]
    except KeyError:
        raise ValueError(f"no limits known for sm_{sm}; known: {ARCHS}") from None
