"""The formulations of a convolution, ready to run: compiled code and every size it is given.

A path is made once per problem and device. ``pack`` lays the weights out, ``start`` launches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TypeAlias

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.problem import ConvProblem

from .config import Arch, Config, Tile, pixel_box
from .dense import channels_last
from .launch import bind
from .layout import matrix, padded_image, parity_view, row_weights, tap_weights
from .plans import conv_launches, image_box, pool_strip, rows_layout, stem_pool_launch

#: An operand as a kernel takes it: a tensor, or a tensor descriptor of one.
Operand: TypeAlias = "Tensor | TensorDescriptor"


class Path(ABC):
    """One formulation for one problem on one device, which must be current."""

    #: Whether tensor cores read the packed weights as tf32.
    tf32 = False

    @property
    @abstractmethod
    def layout(self) -> Hashable:
        """What the packed weights depend on beside the weight itself."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Operand:
        """The weight [K, C, R, S] in the layout of this path."""

    @abstractmethod
    def start(
        self, x: Tensor, w: Operand, scale: Tensor, shift: Tensor, residual: Tensor, y: Tensor
    ) -> None:
        """Launch on the current stream; ``residual`` and ``y`` are dense in channels_last order."""


class GemmPath(Path):
    """1x1, stride 1: [N*H*W, C] by [K, C]^T."""

    def __init__(
        self, problem: ConvProblem, config: Config, arch: Arch, precision: str, device: torch.device
    ) -> None:
        (launch,) = conv_launches(problem, config, arch, precision)
        tile = config.tile
        self._start = bind(launch, device)
        self._problem = problem
        self._tma = config.tma
        self._m = problem.n * problem.h * problem.w
        self._x_box = tile.block_m, tile.block_k
        self._w_box = tile.block_n, tile.block_k
        self._y_box = tile.block_m, tile.block_n // tile.parts

    @property
    def layout(self) -> Hashable:
        """The box of a descriptor, or plain memory."""
        return self._w_box if self._tma else None

    def pack(self, weight: Tensor) -> Operand:
        """[K, C], or a descriptor of it."""
        w = tap_weights(self._problem, weight, 1)
        return matrix(w, self._problem.k, self._problem.c, self._w_box) if self._tma else w

    def start(
        self, x: Tensor, w: Operand, scale: Tensor, shift: Tensor, residual: Tensor, y: Tensor
    ) -> None:
        """One launch; descriptors of the activations are made for their addresses."""
        x = channels_last(x)
        m, k = self._m, self._problem.k
        if not self._tma:
            self._start(x, w, scale, shift, residual, y, m)
            return
        out = matrix(y, m, k, self._y_box)
        r = out if residual is y else matrix(residual, m, k, self._y_box)
        self._start(matrix(x, m, self._problem.c, self._x_box), w, scale, shift, r, out, m)


class ConvPath(Path):
    """Implicit GEMM of any problem, the reduction split where programs are too few."""

    def __init__(
        self, problem: ConvProblem, config: Config, arch: Arch, precision: str, device: torch.device
    ) -> None:
        launches = conv_launches(problem, config, arch, precision)
        self._start, *rest = (bind(launch, device) for launch in launches)
        self._reduce = rest[0] if rest else None
        self._problem = problem
        self._config = config
        oh, ow = problem.conv_size
        self._m = problem.n * oh * ow
        self._sizes: tuple[int, ...] = (problem.n, problem.h, problem.w, oh, ow)
        self._box = config.tile.block_n, config.tile.block_k

    @property
    def layout(self) -> Hashable:
        """Merged groups, and the box of a descriptor."""
        return self._config.merged, self._box if self._config.tma else None

    def pack(self, weight: Tensor) -> Operand:
        """[K, R, S, C], groups merged, or a descriptor of it as [K, R*S*C]."""
        w = tap_weights(self._problem, weight, self._config.merged)
        k = self._problem.k
        return matrix(w, k, w.numel() // k, self._box) if self._config.tma else w

    def start(
        self, x: Tensor, w: Operand, scale: Tensor, shift: Tensor, residual: Tensor, y: Tensor
    ) -> None:
        """One launch, or two with a workspace of partial sums between them."""
        pixels = self._pixels(channels_last(x))
        if self._reduce is None:
            self._start(pixels, w, scale, shift, residual, y, *self._sizes)
            return
        partial = torch.empty(
            (self._config.split_k, self._m, self._problem.k), dtype=torch.float32, device=x.device
        )
        self._start(pixels, w, scale, shift, residual, partial, *self._sizes)
        self._reduce(partial, scale, shift, residual, y, self._m)

    def _pixels(self, x: Tensor) -> Operand:
        """X as the kernel takes it."""
        return x


class BoxesPath(ConvPath):
    """Implicit GEMM as ``ConvPath``, but the pixels come through a tensor descriptor too."""

    def __init__(
        self, problem: ConvProblem, config: Config, arch: Arch, precision: str, device: torch.device
    ) -> None:
        super().__init__(problem, config, arch, precision, device)
        self._sizes = problem.n, *problem.conv_size
        tile = config.tile
        self._image_box = image_box(pixel_box(problem, tile.block_m), tile.block_k)

    def _pixels(self, x: Tensor) -> Operand:
        return parity_view(x, self._problem.stride, self._image_box)


class RowsPath(Path):
    """Few input channels: filter rows as contiguous runs of a padded image."""

    def __init__(
        self, problem: ConvProblem, config: Config, arch: Arch, precision: str, device: torch.device
    ) -> None:
        (launch,) = conv_launches(problem, config, arch, precision)
        self._start = bind(launch, device)
        self._problem = problem
        self._rows = rows_layout(problem, config.tile.block_k)
        oh, ow = problem.conv_size
        self._sizes: tuple[int, ...] = (problem.n, oh, ow, self._rows.hp, self._rows.row_units)

    @property
    def layout(self) -> Hashable:
        """The runs' shape."""
        return self._rows.cp, self._rows.seg, self._rows.rows

    def pack(self, weight: Tensor) -> Operand:
        """[K, rows, seg]."""
        return row_weights(self._problem, weight, self._rows)

    def _image(self, x: Tensor) -> Tensor:
        rows = self._rows
        return padded_image(x, (rows.hp, rows.wp, rows.cp), self._problem.padding, x.dtype)

    def start(
        self, x: Tensor, w: Operand, scale: Tensor, shift: Tensor, residual: Tensor, y: Tensor
    ) -> None:
        """Two launches: the padded image, which takes x in any layout, and the convolution."""
        self._start(self._image(x), w, scale, shift, residual, y, *self._sizes)


class StemPoolPath(RowsPath):
    """The stem with its max-pool: as ``RowsPath``, but y is pooled."""

    def __init__(
        self, problem: ConvProblem, tile: Tile, arch: Arch, precision: str, device: torch.device
    ) -> None:
        self._start = bind(stem_pool_launch(problem, tile, arch, precision), device)
        self._problem = problem
        self._rows = rows_layout(problem, tile.block_k)
        _, _, ph, pw = problem.out_shape
        sizes = *problem.conv_size, ph, pw, self._rows.hp, self._rows.row_units
        self._sizes = *sizes, pool_strip(problem, tile, arch)

    def start(
        self, x: Tensor, w: Operand, scale: Tensor, shift: Tensor, residual: Tensor, y: Tensor
    ) -> None:
        """Two launches; there is no residual."""
        del residual
        self._start(self._image(x), w, scale, shift, y, *self._sizes)


def make_path(
    problem: ConvProblem, config: Config, arch: Arch, precision: str, device: torch.device
) -> Path:
    """The path that ``config`` names."""
    paths: dict[str, type[GemmPath | ConvPath | RowsPath]] = {
        "gemm": GemmPath, "conv": ConvPath, "boxes": BoxesPath, "rows": RowsPath,
    }  # fmt: skip
    return paths[config.path](problem, config, arch, precision, device)
