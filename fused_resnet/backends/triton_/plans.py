"""From a problem and a configuration to launches: pure functions, shared by all that compile.

What is here needs neither tensors nor a GPU; ``kernels`` runs it, and certificates compile it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet.problem import AddReluProblem, ConvProblem

from .boxes import conv_boxes_kernel
from .config import Arch, Config, Tile, count_boxes, padded_channels, pixel_box
from .conv import conv_kernel
from .gemm import gemm_kernel, gemm_tma_kernel
from .images import add_relu_kernel, mean_kernel, pad_kernel
from .launch import Launch, box, pointer
from .reduce import reduce_kernel
from .stem import conv_rows_kernel, stem_pool_kernel

#: From this many elements on, offsets are computed in 64 bits; the slack covers tiles beyond the
#: edge.
WIDE_ELEMENTS = 2**31 - 2**24


def is_wide(*elements: int) -> bool:
    """Whether a tensor of one of these sizes needs 64-bit offsets."""
    return max(elements) >= WIDE_ELEMENTS


def _launch(
    kernel: Any,
    signature: list[tuple[str, str]],
    constants: dict[str, Any],
    tile: Tile,
    grid: tuple[int, int, int],
) -> Launch:
    options = (("num_warps", tile.num_warps), ("num_stages", tile.num_stages))
    return Launch(kernel, tuple(signature), tuple(constants.items()), options, grid)


def _operands(problem: ConvProblem, out: torch.dtype) -> list[tuple[str, str]]:
    """Signature of the tensors of a convolution, all of them pointers."""
    kind = pointer(problem.dtype)
    vector = pointer(torch.float32)
    return [
        ("x", kind), ("w", kind), ("scale", vector), ("shift", vector),
        ("residual", kind), ("y", pointer(out)),
    ]  # fmt: skip


def _tile_constants(config: Config) -> dict[str, Any]:
    tile = config.tile
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": config.group_m,
    }


def conv_launches(
    problem: ConvProblem, config: Config, arch: Arch, precision: str
) -> tuple[Launch, ...]:
    """The launches of a convolution of laid-out input: one, or two with a split reduction."""
    if config.path == "gemm":
        return (_gemm(problem, config, arch, precision),)
    if config.path == "rows":
        return (_rows(problem, config, precision),)
    conv = (_boxes if config.path == "boxes" else _conv)(problem, config, precision)
    return (conv,) if config.split_k == 1 else (conv, _reduce(problem, config))


def _gemm(problem: ConvProblem, config: Config, arch: Arch, precision: str) -> Launch:
    tile = config.tile
    m = problem.n * problem.h * problem.w
    tiles = math.ceil(m / tile.block_m) * math.ceil(problem.k / tile.block_n)
    sizes = {"C": problem.c, "K": problem.k} | _tile_constants(config)
    if config.tma:
        operand = problem.dtype
        vector = pointer(torch.float32)
        part = tile.block_n // tile.parts
        signature = [
            ("x", box(operand, tile.block_m, tile.block_k)),
            ("w", box(operand, tile.block_n, tile.block_k)),
            ("scale", vector),
            ("shift", vector),
            ("residual", box(operand, tile.block_m, part)),
            ("y", box(operand, tile.block_m, part)),
            ("m", "i32"),
        ]
        constants = sizes | {
            "EPILOGUE": problem.epilogue,
            "PRECISION": precision,
            "WARP_SPECIALIZE": config.warp_specialize,
        }
        grid = (min(tiles, arch.sms * tile.resident), 1, 1)
        return _launch(gemm_tma_kernel, signature, constants, tile, grid)
    constants = sizes | {
        "PARTS": tile.parts,
        "EPILOGUE": problem.epilogue,
        "PRECISION": precision,
        "WIDE": is_wide(m * problem.c, m * problem.k, problem.c * problem.k),
    }
    signature = [*_operands(problem, problem.dtype), ("m", "i32")]
    return _launch(gemm_kernel, signature, constants, tile, (tiles, 1, 1))


def _conv(problem: ConvProblem, config: Config, precision: str) -> Launch:
    tile = config.tile
    groups = problem.groups // config.merged
    c, k = problem.c // groups, problem.k // groups
    oh, ow = problem.conv_size
    m = problem.n * oh * ow
    tiles = math.ceil(m / tile.block_m) * math.ceil(k / tile.block_n) * groups
    split = config.split_k
    signature = _operands(problem, problem.dtype if split == 1 else torch.float32)
    if config.tma:
        signature[1] = ("w", box(problem.dtype, tile.block_n, tile.block_k))
    signature += [(name, "i32") for name in ("n", "h", "w_in", "oh", "ow")]
    constants = {
        "C": c,
        "K": k,
        "GROUPS": groups,
        "MERGED": config.merged,
        **_window_constants(problem),
        **_tile_constants(config),
        **_finish_constants(problem, config, precision),
        "W_TMA": config.tma,
        "WIDE": is_wide(
            problem.n * problem.c * problem.h * problem.w,
            split * m * problem.k,
            problem.k * c * problem.r * problem.s,
        ),
    }
    return _launch(conv_kernel, signature, constants, tile, (tiles, split, 1))


def _boxes(problem: ConvProblem, config: Config, precision: str) -> Launch:
    tile, split = config.tile, config.split_k
    oh, ow = problem.conv_size
    pixels = pixel_box(problem, tile.block_m)
    signature = _operands(problem, problem.dtype if split == 1 else torch.float32)
    signature[0] = ("x", box(problem.dtype, *image_box(pixels, tile.block_k)))
    signature[1] = ("w", box(problem.dtype, tile.block_n, tile.block_k))
    signature += [(name, "i32") for name in ("n", "oh", "ow")]
    constants = {
        "C": problem.c,
        "K": problem.k,
        **_window_constants(problem),
        **_tile_constants(config),
        **_finish_constants(problem, config, precision),
        "WIDE": is_wide(split * problem.n * oh * ow * problem.k),
    }
    tiles = count_boxes(problem, pixels) * math.ceil(problem.k / tile.block_n)
    return _launch(conv_boxes_kernel, signature, constants, tile, (tiles, split, 1))


def image_box(pixels: tuple[int, int, int], block_k: int) -> tuple[int, ...]:
    """The box of ``conv_boxes_kernel``'s view of the image: one parity of rows, one of columns."""
    images, rows, columns = pixels
    return images, rows, 1, columns, block_k


def _window_constants(problem: ConvProblem) -> dict[str, Any]:
    return {
        "R": problem.r,
        "S": problem.s,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1],
    }


def _finish_constants(problem: ConvProblem, config: Config, precision: str) -> dict[str, Any]:
    return {
        "SPLIT_K": config.split_k,
        "PARTS": config.tile.parts,
        "EPILOGUE": problem.epilogue if config.split_k == 1 else "partial",
        "PRECISION": precision,
    }


#: Tile of the reduction of partial sums.
_REDUCE = Tile(16, 64, 0, 4, 1)


def _reduce(problem: ConvProblem, config: Config) -> Launch:
    oh, ow = problem.conv_size
    m = problem.n * oh * ow
    signature = _operands(problem, problem.dtype)[2:]
    signature = [("partial", pointer(torch.float32)), *signature, ("m", "i32")]
    constants = {
        "K": problem.k,
        "SPLIT_K": config.split_k,
        "BLOCK_M": _REDUCE.block_m,
        "BLOCK_N": _REDUCE.block_n,
        "EPILOGUE": problem.epilogue,
        "WIDE": is_wide(config.split_k * m * problem.k),
    }
    grid = (math.ceil(m / _REDUCE.block_m), math.ceil(problem.k / _REDUCE.block_n), 1)
    return _launch(reduce_kernel, signature, constants, _REDUCE, grid)


@dataclass(frozen=True)
class Rows:
    """Layout of the padded image [n, hp, wp, cp] and weights [K, rows, seg] of ``rows``."""

    cp: int
    seg: int
    rows: int
    hp: int
    wp: int
    unit: int

    @property
    def row_units(self) -> int:
        """16-byte units in one row of the padded image."""
        return self.wp * self.cp // self.unit


def rows_layout(problem: ConvProblem, block_k: int) -> Rows:
    """The layout for slices of ``block_k`` products."""
    cp = padded_channels(problem)
    if cp is None:
        raise ValueError(f"{problem} has no padded-image layout")
    seg = 1 << (problem.s * cp - 1).bit_length()
    rows = math.ceil(problem.r / (block_k // seg)) * (block_k // seg)
    oh, ow = problem.conv_size
    unit = 16 // problem.dtype.itemsize
    wp = (ow - 1) * problem.stride[1] + seg // cp
    step = max(unit // cp, 1)
    return Rows(
        cp=cp,
        seg=seg,
        rows=rows,
        hp=(oh - 1) * problem.stride[0] + rows,
        wp=math.ceil(wp / step) * step,
        unit=unit,
    )


def _rows_constants(problem: ConvProblem, rows: Rows) -> dict[str, Any]:
    return {
        "K": problem.k,
        "R": problem.r,
        "RUN": problem.s * rows.cp,
        "SEG": rows.seg,
        "STRIDE_H": problem.stride[0],
        "STEP_W": problem.stride[1] * rows.cp,
        "UNIT": rows.unit,
    }


def _rows(problem: ConvProblem, config: Config, precision: str) -> Launch:
    tile = config.tile
    rows = rows_layout(problem, tile.block_k)
    oh, ow = problem.conv_size
    m = problem.n * oh * ow
    sizes = [(name, "i32") for name in ("n", "oh", "ow", "hp", "row_units")]
    constants = {
        **_rows_constants(problem, rows),
        **_tile_constants(config),
        "PARTS": tile.parts,
        "EPILOGUE": problem.epilogue,
        "PRECISION": precision,
        "WIDE": is_wide(problem.n * rows.hp * rows.wp * rows.cp, m * problem.k),
    }
    grid = (math.ceil(m / tile.block_m) * math.ceil(problem.k / tile.block_n), 1, 1)
    signature = _operands(problem, problem.dtype) + sizes
    return _launch(conv_rows_kernel, signature, constants, tile, grid)


def pool_strip(problem: ConvProblem, tile: Tile, arch: Arch) -> int:
    """Pooled rows of one program of the fused stem: as many as still give every SM two programs."""
    _, _, ph, pw = problem.out_shape
    columns = math.ceil(pw / (tile.block_m // 2 - 1))
    for strip in (14, 7, 4):
        if problem.n * math.ceil(ph / strip) * columns >= 2 * arch.sms:
            return strip
    return 2


def stem_excess(problem: ConvProblem, tile: Tile, arch: Arch) -> float:
    """Pixels of the convolution that the fused stem computes beyond those it must, as a share.

    Each program computes block_m columns for block_m / 2 - 1 pooled ones, and the conv row above
    its strip once more: 22% for 224x224 images and strips of 7 rows, 43% for strips of 2.
    """
    oh, ow = problem.conv_size
    _, _, ph, pw = problem.out_shape
    strip = pool_strip(problem, tile, arch)
    rows = 2 * ph + math.ceil(ph / strip)
    columns = math.ceil(pw / (tile.block_m // 2 - 1)) * tile.block_m
    return rows * columns / (oh * ow) - 1.0


def stem_pool_launch(problem: ConvProblem, tile: Tile, arch: Arch, precision: str) -> Launch:
    """The fused stem: convolution, affine, ReLU and 3x3 max-pool of stride 2."""
    rows = rows_layout(problem, tile.block_k)
    n, k, ph, pw = problem.out_shape
    signature = [pair for pair in _operands(problem, problem.dtype) if pair[0] != "residual"]
    sizes = ("oh", "ow", "ph", "pw", "hp", "row_units", "strip")
    signature += [(name, "i32") for name in sizes]
    constants = {
        **_rows_constants(problem, rows),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PRECISION": precision,
        "WIDE": is_wide(n * rows.hp * rows.wp * rows.cp, n * ph * pw * k),
    }
    strips = math.ceil(ph / pool_strip(problem, tile, arch)) * math.ceil(
        pw / (tile.block_m // 2 - 1)
    )
    grid = (strips, math.ceil(k / tile.block_n), n)
    return _launch(stem_pool_kernel, signature, constants, tile, grid)


#: Elements of one program of ``pad_kernel``, pixels and channels of one of ``mean_kernel``, and
#: elements of one of ``add_relu_kernel``: 16 bytes a thread and more.
_PAD_ELEMENTS, _MEAN_TILE, _FLAT = 2048, (32, 64), 2048
_PLAIN = Tile(0, 0, 0, 4, 1)


def pad_launch(
    shape: tuple[int, ...],
    padded: tuple[int, int, int],
    source: torch.dtype,
    dtype: torch.dtype,
    extent: int,
    normalise: bool,
) -> Launch:
    """Copy of [n, c, h, w] into a zero-bordered channels_last image [n, hp, wp, cp], cast to dtype.

    ``padded`` is (hp, wp, cp); ``extent`` is one more than the largest offset read from the source.
    """
    n, c, _, _ = shape
    hp, wp, cp = padded
    vector = pointer(torch.float32)
    signature = [
        ("x", pointer(source, aligned=False)), ("factor", vector), ("offset", vector), ("y",
        pointer(dtype)),
    ]  # fmt: skip
    names = (
        "pixels", "h", "w", "hp", "wp", "top", "left", "stride_n", "stride_c", "stride_h",
        "stride_w",
    )  # fmt: skip
    wide = is_wide(extent, n * hp * wp * cp)
    signature += [(name, "i64" if wide else "i32") for name in names]
    tile_c = min(1 << (cp - 1).bit_length(), 64)
    constants = {
        "C": c,
        "CP": cp,
        "TILE_C": tile_c,
        "NORMALISE": normalise,
        "BLOCK": _PAD_ELEMENTS // tile_c,
        "WIDE": wide,
    }
    blocks = math.ceil(n * hp * wp / constants["BLOCK"]) * math.ceil(cp / tile_c)
    return _launch(pad_kernel, signature, constants, _PLAIN, (blocks, 1, 1))


def mean_launch(n: int, c: int, pixels: int, dtype: torch.dtype) -> Launch:
    """Global average pool of a channels_last [n, c, h, w] with ``pixels`` = h * w."""
    signature = [("x", pointer(dtype)), ("y", pointer(dtype)), ("pixels", "i32")]
    block_p, block_c = _MEAN_TILE
    constants = {"C": c, "BLOCK_P": block_p, "BLOCK_C": block_c, "WIDE": is_wide(n * c * pixels)}
    return _launch(mean_kernel, signature, constants, _PLAIN, (n, math.ceil(c / block_c), 1))


def flat_unit(size: int) -> int:
    """Elements that a flat array of ``size`` elements is a multiple of: up to 16."""
    return math.gcd(size, 16)


def add_relu_launch(problem: AddReluProblem, aligned: bool = True) -> Launch:
    """``relu(a + b)`` over flat memory; ``aligned`` says that all arrays start at 16 bytes."""
    kind = pointer(problem.dtype, aligned)
    size = math.prod(problem.shape)
    signature = [("a", kind), ("b", kind), ("y", kind), ("units", "i32")]
    constants = {"UNIT": flat_unit(size), "BLOCK": _FLAT, "WIDE": is_wide(size)}
    return _launch(add_relu_kernel, signature, constants, _PLAIN, (math.ceil(size / _FLAT), 1, 1))
