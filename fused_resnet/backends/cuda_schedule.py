"""How the CUDA implicit GEMM divides a convolution among thread blocks.

A schedule is a value: `candidates` enumerates those that make sense for a problem, so that a tuner
can time them, and `choose` picks one from a model of the GPU, without measuring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fused_resnet.problem import ConvProblem


@dataclass(frozen=True)
class Tile:
    """Output pixels by output channels of one thread block; see ``csrc/cuda/conv_tile.h``.

    Attributes:
        index: the tile's ``ConvTileName``.
        pixels: rows of the block's product.
        channels: columns of the block's product.
        row_bytes: bytes of the reduction in one slice, one trip through shared memory.
        stages: slices that shared memory holds.
        resident: blocks that fit on a multiprocessor of sm_80, by registers and shared memory.
        tensor_share: predicted share of the tensor rate in the loop, as the certifier computes it.
    """

    index: int
    pixels: int
    channels: int
    row_bytes: int
    stages: int
    resident: int
    tensor_share: float

    @property
    def name(self) -> str:
        """The tile as tables print it: ``128x64``."""
        return f"{self.pixels}x{self.channels}"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.stages * (self.pixels + self.channels) * self.row_bytes


TILES = (
    Tile(0, 128, 128, 64, 4, 2, 1.0),
    Tile(1, 128, 64, 64, 4, 3, 0.89),
    Tile(2, 64, 128, 64, 4, 3, 0.89),
    Tile(3, 64, 64, 128, 3, 3, 0.67),
)

#: Tiles that the gathering kernel comes in, and those for wide kernels.
GATHER_TILES = (TILES[1], TILES[3])
WIDE_GATHER_TILES = (TILES[3],)

#: The most rows and columns that a gathering table has bits for, as ``csrc/cuda/conv_tile.h``.
_GATHER_ROWS, _GATHER_COLUMNS = 16, 15

#: Blocks that may share one tile's reduction.
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class ConvSchedule:
    """A tile, and the number of blocks that share its reduction."""

    tile: Tile
    splits: int = 1

    @property
    def name(self) -> str:
        """The schedule as tables print it: ``128x64`` or ``64x64/4``."""
        return self.tile.name + (f"/{self.splits}" if self.splits > 1 else "")


def slices(problem: ConvProblem, tile: Tile, gather: bool) -> int:
    """Trips through shared memory that the whole reduction takes."""
    elements = tile.row_bytes // problem.dtype.itemsize
    c = problem.c // problem.groups
    if gather:
        return math.ceil(c * problem.r * problem.s / elements)
    return problem.r * problem.s * math.ceil(c / elements)


def gathers_wide(problem: ConvProblem) -> bool:
    """Whether gathering takes the kernel for many rows or columns."""
    return problem.r > _GATHER_ROWS or problem.s > _GATHER_COLUMNS


def candidates(problem: ConvProblem, gather: bool = False) -> tuple[ConvSchedule, ...]:
    """Every schedule worth timing: all tiles, and splits that leave each block four slices or more.

    Args:
        problem: with the groups that the kernel will see (``backends.cuda.bundled``).
        gather: whether the gathering kernel serves it.
    """
    narrow = WIDE_GATHER_TILES if gathers_wide(problem) else GATHER_TILES
    return tuple(
        ConvSchedule(tile, splits)
        for tile in (narrow if gather else TILES)
        for splits in SPLITS
        if splits == 1 or slices(problem, tile, gather) >= 4 * splits
    )


def choose(
    problem: ConvProblem,
    multiprocessors: int,
    gather: bool = False,
    among: tuple[ConvSchedule, ...] | None = None,
) -> ConvSchedule:
    """The schedule that `predicted_cycles` ranks first; of equals, the earlier.

    Args:
        problem: as for `candidates`.
        multiprocessors: of the GPU.
        gather: as for `candidates`.
        among: what to choose from; by default all `candidates`.

    Example:
        >>> choose(ConvProblem(256, 64, 56, 56, 64, 3, 3, ...), 108).name
        '128x64'
    """
    return min(
        among or candidates(problem, gather),
        key=lambda schedule: predicted_cycles(problem, schedule, multiprocessors, gather),
    )


#: fp16 multiply-adds per cycle and multiprocessor of sm_80; half of that for tf32.
_MULTIPLY_ADDS = 1024
#: Cycles before a slice that was asked for has landed, and cycles to start and to finish a block.
_LATENCY, _BLOCK_OVERHEAD = 700.0, 1500.0
#: Cycles of one more kernel launch, and bytes per cycle and multiprocessor through L2.
_LAUNCH, _L2_BYTES = 3000.0, 40.0


def predicted_cycles(
    problem: ConvProblem, schedule: ConvSchedule, multiprocessors: int, gather: bool = False
) -> float:
    """A model of the kernel's time, for ranking schedules only.

    Blocks run in waves. A multiprocessor's blocks share its tensor cores, and a block alone is held
    up by the latency of its slices; both bounds hold at once. Splitting pays for writing, reading
    and adding fp32 sums and for a second launch.
    """
    tile, splits = schedule.tile, schedule.splits
    _, _, oh, ow = problem.out_shape
    pixels = problem.n * oh * ow
    tiles = problem.groups * math.ceil(pixels / tile.pixels)
    blocks = tiles * math.ceil(problem.k // problem.groups / tile.channels) * splits
    own_slices = math.ceil(slices(problem, tile, gather) / splits)
    elements = tile.row_bytes // problem.dtype.itemsize
    work = tile.pixels * tile.channels * elements * own_slices
    rate = _MULTIPLY_ADDS * tile.tensor_share * 2 / problem.dtype.itemsize
    per_multiprocessor = math.ceil(blocks / multiprocessors)
    waves = math.ceil(per_multiprocessor / tile.resident)
    alone = own_slices * _LATENCY / (tile.stages - 1)
    cycles = max(per_multiprocessor * work / rate, waves * alone) + waves * _BLOCK_OVERHEAD
    if splits > 1:
        traffic = 8 * splits * pixels * problem.k
        cycles += _LAUNCH + traffic / (_L2_BYTES * multiprocessors)
    return cycles


__all__ = [
    "GATHER_TILES",
    "SPLITS",
    "TILES",
    "WIDE_GATHER_TILES",
    "ConvSchedule",
    "Tile",
    "candidates",
    "choose",
    "gathers_wide",
    "predicted_cycles",
    "slices",
]
