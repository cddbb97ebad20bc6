"""Tile shapes: the space of every kernel and GPU, and the pure function that picks from it.

Every tile here compiles without spills and with asynchronous loads and tensor instructions of its
generation; ``make certify`` proves it for all that the heuristic can return. ``share`` is the
*predicted* fraction of the tensor rate in the main loop, ``resident`` the programs one SM holds at
once; nothing here has been timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fused_resnet.problem import ConvProblem


@dataclass(frozen=True)
class Arch:
    """What of a GPU matters here: compute capability (80, 90 ...) and number of multiprocessors."""

    capability: int
    sms: int

    @property
    def family(self) -> str:
        """Tensor instructions that Triton emits: ``mma`` (``mma.sync``), ``wgmma``, ``tcgen05``."""
        if self.capability == 90:
            return "wgmma"
        return "tcgen05" if 100 <= self.capability < 110 else "mma"

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory one block may have."""
        kib = {80: 163, 87: 163, 90: 227}.get(self.capability, 99)
        return 1024 * (227 if self.family == "tcgen05" else kib)

    def multiply_adds(self, dtype: torch.dtype, precision: str) -> int:
        """Multiply-adds of one SM in one cycle (vendor's figures; dense, fp32 accumulation)."""
        if dtype == torch.float32 and precision == "ieee":
            return 64 if self.capability == 80 else 128
        rate = {80: 1024, 90: 2048}.get(self.capability, 4096 if self.family == "tcgen05" else 512)
        return rate // 2 if dtype == torch.float32 else rate


#: The GPUs that certificates are made for, one of each architecture.
ARCHS = (
    Arch(80, 108),  # A100
    Arch(86, 82),  # RTX 3090
    Arch(89, 128),  # RTX 4090
    Arch(90, 132),  # H100 SXM
    Arch(100, 148),  # B200
    Arch(120, 170),  # RTX 5090
)


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work: BLOCK_M pixels by BLOCK_N channels, BLOCK_K products at a time.

    ``parts`` is the number of column blocks of the epilogue.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1
    share: float = 1.0
    resident: int = 1


@dataclass(frozen=True)
class Config:
    """All that a convolution of this backend is specialised for, beyond the problem itself.

    ``path`` is the formulation: ``gemm`` (1x1), ``conv`` (implicit GEMM, any problem), ``boxes``
    (implicit GEMM, pixels by TMA) or ``rows`` (few input channels). ``group_m`` tile rows are
    walked together, so that weights and pixels are found in L2. ``merged`` groups are computed as
    one. With ``tma`` operands come through tensor descriptors: all of them in ``gemm``, the weights
    in ``conv``, pixels and weights in ``boxes``.
    """

    path: str
    tile: Tile
    split_k: int = 1
    group_m: int = 8
    merged: int = 1
    tma: bool = False
    warp_specialize: bool = False

    @property
    def name(self) -> str:
        """The configuration as tables print it: ``conv 128x64x32 w4 s4 tma split2``."""
        t = self.tile
        parts = [f"{self.path} {t.block_m}x{t.block_n}x{t.block_k} w{t.num_warps} s{t.num_stages}"]
        parts += ["tma"] if self.tma else []
        parts += [f"split{self.split_k}"] if self.split_k > 1 else []
        return " ".join(parts)


# 16-bit operands. 64 elements are one 128-byte line of shared memory.
_MMA16 = (
    Tile(128, 128, 32, 4, 4, share=1.00, resident=2),
    Tile(64, 128, 64, 4, 3, share=0.89, resident=2),
    Tile(128, 64, 64, 4, 3, share=0.89, resident=2),
    Tile(64, 64, 64, 4, 3, share=0.67, resident=3),
    Tile(128, 32, 32, 4, 4, share=0.50, resident=3),
)
_WGMMA16_GEMM = (
    Tile(128, 256, 64, 8, 3, parts=4, share=1.00),
    Tile(128, 128, 64, 8, 4, share=1.00),
    Tile(64, 128, 64, 4, 4, share=1.00),
    Tile(128, 64, 64, 4, 4, share=1.00),
)
_WGMMA16_CONV = (
    Tile(128, 256, 64, 8, 3, parts=2, share=1.00),
    Tile(128, 128, 64, 8, 4, parts=2, share=1.00),
    Tile(64, 128, 64, 4, 4, parts=2, share=1.00, resident=2),
    Tile(128, 64, 64, 4, 3, share=0.67, resident=3),
    Tile(128, 32, 32, 4, 4, share=0.33, resident=3),
)
_TCGEN16_GEMM = (
    Tile(128, 256, 64, 8, 3, parts=4, share=1.00),
    Tile(128, 128, 64, 8, 4, parts=2, share=1.00),
    Tile(64, 128, 64, 4, 4, share=1.00),
    Tile(128, 64, 64, 8, 4, share=1.00),
)
# On sm_100 both operands are read from shared memory, where cp.async writes the pixels too:
# that binds all but the widest tile. Layers of K = 128 have ``boxes`` instead.
_TCGEN16_CONV = (
    Tile(128, 256, 64, 8, 3, parts=2, share=1.00),
    Tile(128, 128, 64, 8, 4, parts=2, share=0.66),
    Tile(64, 128, 64, 4, 4, parts=2, share=0.44, resident=2),
    Tile(128, 64, 64, 4, 4, share=0.40, resident=2),
    # Eight warps: rows of odd channel counts are gathered by single elements, with an address each.
    Tile(128, 32, 32, 8, 4, share=0.13, resident=2),
)
_TCGEN16_BOXES = (Tile(128, 128, 64, 4, 3, parts=2, share=1.00, resident=2),)
# tf32: the same bytes, half the elements.
_MMA32 = (
    Tile(128, 128, 32, 8, 3, share=1.00),
    Tile(64, 128, 32, 4, 3, share=0.89, resident=2),
    Tile(128, 64, 32, 4, 3, share=0.89, resident=2),
    Tile(64, 64, 32, 4, 3, share=0.67, resident=3),
    Tile(128, 32, 32, 4, 3, share=0.50, resident=2),
)
_WGMMA32_GEMM = (
    Tile(128, 128, 32, 8, 4, parts=2, share=1.00),
    Tile(64, 128, 32, 4, 4, parts=2, share=1.00, resident=2),
    Tile(128, 64, 32, 4, 4, parts=2, share=1.00, resident=2),
    Tile(128, 32, 32, 4, 4, share=0.33, resident=2),
)
_WGMMA32_CONV = (
    Tile(128, 128, 32, 8, 4, parts=2, share=1.00),
    Tile(64, 128, 32, 4, 4, parts=2, share=1.00, resident=2),
    Tile(128, 64, 32, 4, 4, share=0.67, resident=2),
    Tile(128, 32, 32, 4, 4, share=0.33, resident=2),
)
# Specialised warps take the registers of a whole SM.
_TCGEN32_GEMM = (
    Tile(128, 128, 32, 8, 4, parts=2, share=1.00),
    Tile(64, 128, 32, 4, 4, parts=2, share=1.00),
    Tile(128, 64, 32, 4, 4, share=0.67),
    Tile(128, 32, 32, 4, 4, share=0.40),
)
_TCGEN32_CONV = (
    Tile(128, 256, 32, 8, 3, parts=4, share=1.00),
    Tile(128, 128, 32, 8, 4, parts=2, share=0.66),
    Tile(64, 128, 32, 4, 4, parts=2, share=0.44, resident=2),
    Tile(128, 64, 32, 4, 4, share=0.40, resident=2),
    # Eight warps: with four the addresses of rows are spilled.
    Tile(128, 32, 32, 8, 4, share=0.13, resident=2),
)
_TCGEN32_BOXES = (Tile(128, 128, 32, 4, 3, parts=2, share=1.00, resident=2),)
# Full-precision fp32 runs on the ordinary multiply-add units.
_IEEE = (
    Tile(128, 64, 16, 8, 3, share=0.80, resident=2),
    Tile(64, 64, 16, 4, 3, share=0.80, resident=3),
    Tile(64, 32, 16, 4, 3, share=0.60, resident=4),
)

# Rows of a padded image: a slice is 128 bytes, so that it holds the runs of whole filter rows.
_ROWS16 = (
    Tile(128, 64, 64, 4, 3, parts=2, share=0.89, resident=2),
    Tile(128, 32, 64, 4, 3, share=0.60, resident=3),
)
_ROWS32 = (
    Tile(128, 64, 32, 4, 3, share=0.89, resident=2),
    Tile(128, 32, 32, 4, 3, share=0.60, resident=3),
)
_ROWS_IEEE = (Tile(64, 32, 32, 8, 3, share=0.30, resident=3),)


def _space(family: str, kind: str, path: str) -> tuple[Tile, ...]:
    """Tiles of one path for ``16``-bit, ``tf32`` or ``ieee`` operands."""
    if path == "rows":
        return {"16": _ROWS16, "tf32": _ROWS32, "ieee": _ROWS_IEEE}[kind]
    if kind == "ieee":
        return _IEEE
    if path == "boxes":
        return {"16": _TCGEN16_BOXES, "tf32": _TCGEN32_BOXES}[kind]
    spaces = {
        ("16", "mma"): (_MMA16, _MMA16),
        ("16", "wgmma"): (_WGMMA16_GEMM, _WGMMA16_CONV),
        ("16", "tcgen05"): (_TCGEN16_GEMM, _TCGEN16_CONV),
        ("tf32", "mma"): (_MMA32, _MMA32),
        ("tf32", "wgmma"): (_WGMMA32_GEMM, _WGMMA32_CONV),
        ("tf32", "tcgen05"): (_TCGEN32_GEMM, _TCGEN32_CONV),
    }
    return spaces[kind, family][path == "conv"]


def stem_pool_tile(dtype: torch.dtype, precision: str) -> Tile:
    """Tile of the stem with max-pool: BLOCK_M conv columns, of which BLOCK_M / 2 - 1 are pooled."""
    if dtype == torch.float32 and precision == "ieee":
        return Tile(64, 32, 32, 4, 3, share=0.60, resident=4)
    return Tile(128, 64, 128 // dtype.itemsize, 8, 3, share=0.57, resident=2)


#: Predicted share of the tensor rate that tiles of layers with K >= 128 must reach.
MIN_SHARE = 0.85

#: Channels that merged groups have at least: two 32-byte sectors of 16-bit values.
_MERGED_CHANNELS = 32

#: Splits of the reduction that are considered.
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)

#: Cycles that one wave of programs needs beside its main loop, and that a second launch costs.
_WAVE_CYCLES = 1200
_LAUNCH_CYCLES = 4000

#: Bytes that L2 gives one SM in one cycle.
_L2_BYTES = 64


def merged_groups(problem: ConvProblem) -> int:
    """How many neighbouring groups are computed as one with block-diagonal weights."""
    c = problem.c // problem.groups
    factors = [f for f in range(1, problem.groups + 1) if problem.groups % f == 0]
    wide = [f for f in factors if f * c >= _MERGED_CHANNELS]
    return 1 if problem.groups == 1 else wide[0] if wide else factors[-1]


def padded_channels(problem: ConvProblem) -> int | None:
    """Channels of the padded image of the ``rows`` path, or None where that path does not apply."""
    if problem.groups != 1 or problem.c > 8 or problem.dilation != (1, 1):
        return None
    cp = 4 if problem.c <= 4 else 8
    # A run of one filter row must fit one slice of the reduction: 128 bytes.
    return cp if problem.s * cp * problem.dtype.itemsize <= 128 else None


def has_boxes(problem: ConvProblem) -> bool:
    """Whether the pixels that a filter tap needs are boxes of the image: ``boxes`` says how."""
    strides = zip((problem.h, problem.w), problem.stride, strict=True)
    return problem.groups == 1 and all(size % stride == 0 for size, stride in strides)


def pixel_box(problem: ConvProblem, block_m: int) -> tuple[int, int, int]:
    """Images, rows and columns of the output in one tile of ``boxes``: powers of two.

    As few boxes as possible, and of those the widest: neighbours in a row lie together in memory.
    """
    sizes = [1 << i for i in range(block_m.bit_length())]
    boxes = [
        (block_m // (rows * columns), rows, columns)
        for columns in sizes
        for rows in sizes
        if rows * columns <= block_m
    ]
    return min(boxes, key=lambda box: (count_boxes(problem, box), -box[2], -box[1]))


def count_boxes(problem: ConvProblem, box: tuple[int, int, int]) -> int:
    """Boxes of this shape that cover the output pixels of all images."""
    shape = problem.n, *problem.conv_size
    return math.prod(math.ceil(size / step) for size, step in zip(shape, box, strict=True))


def configs(problem: ConvProblem, arch: Arch, precision: str) -> Iterator[Config]:
    """The space of configurations for this problem: bounded, all valid, in no order.

    ``precision`` is ``tf32`` or ``ieee`` and matters for fp32.
    """
    kind = _kind(problem, precision)
    paths = ["gemm", "conv"] if problem.is_gemm else ["conv"]
    if arch.family == "tcgen05" and kind != "ieee" and has_boxes(problem):
        paths.append("boxes")
    if padded_channels(problem) is not None and not problem.is_gemm:
        paths = ["rows"]
    space = [c for path in paths for c in _path_configs(problem, arch, path, kind)]
    least = 0.0
    if problem.k // problem.groups >= 128:
        # Tensor cores are not wasted where there is a configuration that keeps them busy.
        least = min(MIN_SHARE, max(config.tile.share for config in space))
    yield from (config for config in space if config.tile.share >= least)


def _kind(problem: ConvProblem, precision: str) -> str:
    """``16``-bit, ``tf32`` or ``ieee`` operands."""
    if problem.dtype != torch.float32:
        return "16"
    return "ieee" if precision == "ieee" else "tf32"


def _path_configs(problem: ConvProblem, arch: Arch, path: str, kind: str) -> Iterator[Config]:
    """``configs`` of one path, whatever their share."""
    item = problem.dtype.itemsize
    merged = merged_groups(problem) if path == "conv" else 1
    groups = problem.groups // merged
    c, k = problem.c // groups, problem.k // groups
    asynchronous = arch.family != "mma" and kind != "ieee"
    for tile in _tiles(_space(arch.family, kind, path), k):
        if path == "gemm":
            # Tensor descriptors want rows of a multiple of 16 bytes.
            tma = asynchronous and c * item % 16 == 0 and k * item % 16 == 0
            # Warp specialisation is a schedule of Triton for sm_100; it does nothing on sm_90.
            yield Config(path, tile, tma=tma, warp_specialize=tma and arch.family == "tcgen05")
        elif path == "rows":
            yield Config(path, tile)
        elif path == "conv" or c % tile.block_k == 0:
            # A slice of the weights must not reach into the next filter tap or the next group.
            tma = asynchronous and c % tile.block_k == 0 and problem.k % tile.block_n == 0
            steps = problem.r * problem.s * math.ceil(c / tile.block_k)
            for split in _SPLITS if problem.groups == 1 else (1,):
                if path == "boxes" and problem.is_gemm and split == 1:
                    continue  # ``gemm`` moves larger boxes, and is persistent
                # At least four slices a program, so that the pipeline fills.
                if split == 1 or steps // split >= 4:
                    yield Config(path, tile, split_k=split, merged=merged, tma=tma)


def _tiles(space: tuple[Tile, ...], k: int) -> Iterator[Tile]:
    """Tiles for k output channels: none much wider."""
    narrowest = min(tile.block_n for tile in space)
    return (t for t in space if t.block_n <= max(narrowest, _power_of_two(k)))


def heuristic(problem: ConvProblem, arch: Arch, precision: str) -> Config:
    """The configuration that the model below predicts to be the fastest."""
    return min(
        configs(problem, arch, precision),
        key=lambda config: predicted_cycles(config, problem, arch, precision),
    )


def predicted_cycles(config: Config, problem: ConvProblem, arch: Arch, precision: str) -> float:
    """Cycles by waves: the busiest SM's programs, each bound by tensor cores or by L2 bandwidth.

    A *prediction* that ranks configurations of one problem; it is not a time.
    """
    tile = config.tile
    oh, ow = problem.conv_size
    m = problem.n * oh * ow
    groups = problem.groups // config.merged
    c, k = problem.c // groups, problem.k // groups
    steps = problem.r * problem.s * math.ceil(c / tile.block_k)
    tiles_m = math.ceil(m / tile.block_m)
    if config.path == "boxes":
        tiles_m = count_boxes(problem, pixel_box(problem, tile.block_m))
    programs = tiles_m * math.ceil(k / tile.block_n) * groups * config.split_k
    per_sm = math.ceil(programs / arch.sms)
    depth = math.ceil(steps / config.split_k) * tile.block_k
    rate = arch.multiply_adds(problem.dtype, precision) * tile.share
    compute = tile.block_m * tile.block_n * depth / rate
    loads = (tile.block_m + tile.block_n) * depth * problem.dtype.itemsize / _L2_BYTES
    waves = math.ceil(per_sm / tile.resident)
    cycles = per_sm * max(compute, loads) + waves * _WAVE_CYCLES
    if config.split_k > 1:
        partial = 2 * config.split_k * m * problem.k * 4
        cycles += partial / (_L2_BYTES * arch.sms) + _LAUNCH_CYCLES
    return cycles


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()
