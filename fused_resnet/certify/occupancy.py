"""How many blocks of a kernel fit on one SM, and which resource says so.

The rules are those of NVIDIA's occupancy calculator (``cuda_occupancy.h``): registers are handed
out per warp in units of 256 within one of the four sub-partitions, shared memory per block in
units of 128 bytes after the system's own 1 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arch import Arch


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks per SM allowed by each resource; ``blocks`` is the smallest of them."""

    by_registers: int
    by_shared: int
    by_warps: int
    by_blocks: int
    warps_per_block: int

    @property
    def blocks(self) -> int:
        """Resident blocks per SM; 0 means that the kernel cannot be launched."""
        return min(self.by_registers, self.by_shared, self.by_warps, self.by_blocks)

    @property
    def warps(self) -> int:
        """Resident warps per SM."""
        return self.blocks * self.warps_per_block

    @property
    def limiter(self) -> str:
        """The resource that allows the fewest blocks; ``registers`` first where several tie."""
        limits = {
            "registers": self.by_registers,
            "shared": self.by_shared,
            "warps": self.by_warps,
            "blocks": self.by_blocks,
        }
        return min(limits, key=lambda name: limits[name])


def round_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not less than ``value``."""
    return -(-value // unit) * unit


def occupancy(arch: Arch, *, threads: int, registers: int, shared: int) -> Occupancy:
    """Blocks of a kernel that fit on one SM.

    Args:
        arch: the limits.
        threads: threads per block.
        registers: registers per thread.
        shared: bytes of static and dynamic shared memory per block, the system's part excluded.

    Raises:
        ValueError: more threads than a block may have.

    >>> from fused_resnet.certify import arch, occupancy
    >>> occupancy(arch(80), threads=128, registers=250, shared=48 * 1024).blocks
    2
    """
    if not 1 <= threads <= arch.max_threads_per_block:
        raise ValueError(f"threads per block must be 1..{arch.max_threads_per_block}: {threads}")
    warps = -(-threads // 32)
    per_warp = round_up(max(registers, 1) * 32, arch.register_granularity)
    warps_by_registers = arch.registers_per_sm // arch.partitions // per_warp * arch.partitions
    block_shared = round_up(shared + arch.shared_reserved, arch.shared_granularity)
    return Occupancy(
        by_registers=warps_by_registers // warps if registers <= arch.max_registers else 0,
        by_shared=(
            0
            if shared > arch.shared_per_block
            else arch.shared_per_sm // block_shared
            if block_shared
            else arch.max_blocks
        ),
        by_warps=arch.max_warps // warps,
        by_blocks=arch.max_blocks,
        warps_per_block=warps,
    )
