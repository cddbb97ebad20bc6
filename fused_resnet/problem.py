"""What a kernel is asked to do, as values: shapes, strides, dtype and epilogue, but no data.

A problem is hashable, so choices, tuned results and compiled kernels are keyed by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Epilogues of ``conv_affine_act``, with ``z = conv(x, weight) * scale + shift`` and residual
#: ``r``.
EPILOGUES = ("none", "relu", "add", "add_relu", "relu_add_relu")

#: Epilogues that read a residual.
RESIDUAL_EPILOGUES = frozenset({"add", "add_relu", "relu_add_relu"})

#: Dtypes of activations and weights that kernels may be offered; float64 is served by ``torch``.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def conv_out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output length of one spatial dimension of a convolution or a pooling window."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def channels_last_strides(n: int, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Strides of a dense channels_last [N, C, H, W] tensor, as ``torch.empty`` would set them."""
    return h * w * c, 1, w * c, c


@dataclass(frozen=True)
class MaxPool:
    """The max-pooling that a stem kernel applies to its own output: kernel, stride, padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class ConvProblem:
    """One fused convolution: x [N, C, H, W] with weight [K, C / groups, R, S].

    ``x_channels_last`` says whether x is dense in channels_last order; a kernel that needs it and
    does not get it either converts x or declines. ``pool`` is set for the stem only. The dtype is
    that of x, weight and residual; scale and shift are fp32 (float64 when the dtype is float64).
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    epilogue: str
    dtype: torch.dtype
    x_channels_last: bool = True
    pool: MaxPool | None = None

    @property
    def conv_size(self) -> tuple[int, int]:
        """Height and width that the convolution itself produces."""
        return (
            conv_out_size(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0]),
            conv_out_size(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1]),
        )

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the result, after pooling where there is some."""
        oh, ow = self.conv_size
        if self.pool is not None:
            p = self.pool
            oh = conv_out_size(oh, p.kernel[0], p.stride[0], p.padding[0], 1)
            ow = conv_out_size(ow, p.kernel[1], p.stride[1], p.padding[1], 1)
        return self.n, self.k, oh, ow

    @property
    def has_residual(self) -> bool:
        """Whether the epilogue reads a residual of the output's shape."""
        return self.epilogue in RESIDUAL_EPILOGUES

    @property
    def is_gemm(self) -> bool:
        """Whether this is a plain matrix product over N*H*W rows: 1x1, stride 1, no padding."""
        return (
            (self.r, self.s) == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )

    @property
    def flops(self) -> int:
        """Floating point operations of the convolution (a multiply-add is two)."""
        oh, ow = self.conv_size
        return 2 * self.n * oh * ow * self.k * (self.c // self.groups) * self.r * self.s

    @property
    def min_bytes(self) -> int:
        """Bytes through memory at least: input, weights, residual and output once."""
        item = self.dtype.itemsize
        out = math.prod(self.out_shape)
        weight = self.k * (self.c // self.groups) * self.r * self.s
        reads = self.n * self.c * self.h * self.w + weight + (out if self.has_residual else 0)
        return item * (reads + out) + 8 * self.k

    def __str__(self) -> str:
        """A short line for tables: ``conv 3x3/2 64->128 8x56x56 bfloat16 add_relu``."""
        parts = [f"conv {self.r}x{self.s}"]
        if self.stride != (1, 1):
            parts[0] += f"/{self.stride[0]}" + (
                f"x{self.stride[1]}" if self.stride[0] != self.stride[1] else ""
            )
        parts.append(f"{self.c}->{self.k}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation[0]}x{self.dilation[1]}")
        parts.append(f"{self.n}x{self.h}x{self.w}")
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.epilogue != "none":
            parts.append(self.epilogue)
        if self.pool is not None:
            parts.append(f"maxpool {self.pool.kernel[0]}x{self.pool.kernel[1]}")
        return " ".join(parts)


@dataclass(frozen=True)
class AddReluProblem:
    """``relu(a + b)`` of two tensors of one shape and dtype.

    ``same_dense_strides`` says that a and b are dense and lie alike in memory, so that a kernel may
    walk them as flat arrays.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    inplace: bool
    same_dense_strides: bool

    @property
    def min_bytes(self) -> int:
        """Two reads and one write of every element."""
        return 3 * math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"add_relu {shape} {str(self.dtype).removeprefix('torch.')}"


Problem = ConvProblem | AddReluProblem
