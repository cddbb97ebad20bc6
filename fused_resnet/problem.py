"""What a kernel is asked to do, as values: shapes, strides, dtype and epilogue, but no data.

A problem is hashable, so choices, tuned results and compiled kernels are keyed by it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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


def channels_last_strides(n: int, c: int, *size: int) -> tuple[int, ...]:
    """Strides of a dense channels_last tensor, as ``torch.empty`` would set them.

    Args:
        n: extent of the batch.
        c: of the channels.
        size: of [H, W] or [D, H, W].
    """
    if len(size) == 2:
        h, w = size
        return h * w * c, 1, w * c, c
    d, h, w = size
    return d * h * w * c, 1, h * w * c, w * c, c


def channels_last_format(t: torch.Tensor) -> torch.memory_format:
    """Channels last for a tensor [N, C, H, W] or [N, C, D, H, W]."""
    return torch.channels_last_3d if t.dim() == 5 else torch.channels_last


@dataclass(frozen=True)
class MaxPool:
    """The max-pooling that a stem kernel applies to its own output: kernel, stride, padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class Convolution(ABC):
    """What fused convolutions of images and of videos have in common.

    Attributes:
        n: images.
        c: channels of x.
        k: channels of the result.
        stride: of the window, by dimension of space.
        padding: zeros on each side, by dimension of space.
        dilation: spacing of the window's taps, by dimension of space.
        groups: blocked connections from input to output channels.
        epilogue: one of `EPILOGUES`.
        dtype: of x, weight and residual; scale and shift are fp32 (float64 when it is float64).
        pool: of the stem only.
    """

    n: int
    c: int
    k: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    epilogue: str
    dtype: torch.dtype
    pool: MaxPool | None = None

    @property
    @abstractmethod
    def in_shape(self) -> tuple[int, ...]:
        """Shape of x."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def conv_size(self) -> tuple[int, ...]:
        """Extents in space that the convolution itself produces."""
        window = self.weight_shape[2:], self.stride, self.padding, self.dilation
        return tuple(map(conv_out_size, self.in_shape[2:], *window))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result, after pooling where there is some."""
        return self.n, self.k, *self.conv_size

    @property
    def has_residual(self) -> bool:
        """Whether the epilogue reads a residual of the output's shape."""
        return self.epilogue in RESIDUAL_EPILOGUES

    @property
    def flops(self) -> int:
        """Floating point operations of the convolution (a multiply-add is two)."""
        return 2 * self.n * math.prod(self.conv_size) * math.prod(self.weight_shape)

    @property
    def min_bytes(self) -> int:
        """Bytes through memory at least: input, weights, residual and output once."""
        out = math.prod(self.out_shape)
        reads = math.prod(self.in_shape) + math.prod(self.weight_shape)
        reads += out if self.has_residual else 0
        return self.dtype.itemsize * (reads + out) + 8 * self.k

    def __str__(self) -> str:
        """A short line for tables: ``conv 3x3/2 64->128 8x56x56 bfloat16 add_relu``."""
        parts = [f"conv {_by(self.weight_shape[2:])}"]
        if set(self.stride) != {1}:
            alike = len(set(self.stride)) == 1
            parts[0] += f"/{self.stride[0] if alike else _by(self.stride)}"
        parts.append(f"{self.c}->{self.k}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if set(self.dilation) != {1}:
            parts.append(f"dilation={_by(self.dilation)}")
        parts.append(_by((self.n, *self.in_shape[2:])))
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.epilogue != "none":
            parts.append(self.epilogue)
        if self.pool is not None:
            parts.append(f"maxpool {_by(self.pool.kernel)}")
        return " ".join(parts)


def _by(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


@dataclass(frozen=True)
class ConvProblem(Convolution):
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
    def in_shape(self) -> tuple[int, int, int, int]:
        """Shape of x."""
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight."""
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def conv_size(self) -> tuple[int, int]:
        """Height and width that the convolution itself produces."""
        oh, ow = super().conv_size
        return oh, ow

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
    def is_gemm(self) -> bool:
        """Whether this is a plain matrix product over N*H*W rows: 1x1, stride 1, no padding."""
        return (
            (self.r, self.s) == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )


@dataclass(frozen=True)
class Conv3dProblem(Convolution):
    """One fused convolution of videos: x [N, C, D, H, W] with weight [K, C / groups, T, R, S].

    ``size`` is (D, H, W), ``kernel`` (T, R, S); the other tuples are in the same order. The dtype
    is that of x, weight and residual; scale and shift are fp32 (float64 when the dtype is float64).
    """

    n: int
    c: int
    size: tuple[int, int, int]
    k: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    groups: int
    epilogue: str
    dtype: torch.dtype

    @property
    def in_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of x."""
        return self.n, self.c, *self.size

    @property
    def weight_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the weight."""
        return self.k, self.c // self.groups, *self.kernel


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


#: What a chained bottleneck leaves of its output: all pixels, those of even row and column, or
#: their mean.
STORES = ("all", "even", "pool")


@dataclass(frozen=True)
class ChainProblem:
    """A bottleneck from its 3x3 convolution on, and the first 1x1 of the next one.

        mid [n, m, h, w] --3x3, stride--> ReLU --1x1--> + residual, ReLU = out --1x1--> ReLU

    The 3x3 has padding 1; ``k`` are the channels of out, ``next`` those after the last 1x1 (0:
    there is none). ``proj`` > 0 are the channels of the block's input, whose 1x1 projection is the
    residual: it is read every ``step`` pixels, where ``step`` is the stride, or 1 if what is given
    has been thinned out already. ``store`` is one of `STORES`. All scales and shifts are fp32
    (float64 when the dtype is float64).
    """

    n: int
    m: int
    h: int
    w: int
    k: int
    next: int
    proj: int
    stride: int
    step: int
    store: str
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int]:
        """Height and width after the 3x3."""
        return (self.h - 1) // self.stride + 1, (self.w - 1) // self.stride + 1

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of what is left of the block's output."""
        oh, ow = self.size
        if self.store == "pool":
            return self.n, self.k, 1, 1
        if self.store == "even":
            return self.n, self.k, (oh + 1) // 2, (ow + 1) // 2
        return self.n, self.k, oh, ow

    @property
    def next_shape(self) -> tuple[int, int, int, int]:
        """Shape of the next block's first activation; of no elements where there is none."""
        return self.n, self.next, *self.size

    @property
    def residual_shape(self) -> tuple[int, int, int, int]:
        """Shape of the residual, or of the smallest projection input (larger by up to step - 1)."""
        oh, ow = self.size
        if not self.proj:
            return self.n, self.k, oh, ow
        return self.n, self.proj, (oh - 1) * self.step + 1, (ow - 1) * self.step + 1

    @property
    def convolutions(self) -> dict[str, ConvProblem]:
        """The convolutions it is made of: ``2``, ``3``, and ``proj`` and ``next`` if there are."""
        oh, ow = self.size
        _, _, rh, rw = self.residual_shape

        def conv(c: int, h: int, w: int, k: int, r: int, stride: int, epilogue: str) -> ConvProblem:
            geometry = (stride, stride), (r // 2, r // 2), (1, 1), 1
            return ConvProblem(self.n, c, h, w, k, r, r, *geometry, epilogue, self.dtype)

        found = {
            "2": conv(self.m, self.h, self.w, self.m, 3, self.stride, "relu"),
            "3": conv(self.m, oh, ow, self.k, 1, 1, "add_relu"),
        }
        if self.proj:
            found["proj"] = conv(self.proj, rh, rw, self.k, 1, self.step, "none")
        if self.next:
            found["next"] = conv(self.k, oh, ow, self.next, 1, 1, "relu")
        return found

    @property
    def flops(self) -> int:
        """Floating point operations of the convolutions (a multiply-add is two)."""
        per_pixel = 9 * self.m * self.m + self.m * self.k + self.k * (self.next + self.proj)
        return 2 * self.n * math.prod(self.size) * per_pixel

    @property
    def min_bytes(self) -> int:
        """Bytes through memory at least: every operand and every result once.

        Of a projection's input only the pixels that are sampled.
        """
        pixels = self.n * math.prod(self.size)
        activations = self.n * self.m * self.h * self.w + pixels * (self.proj or self.k)
        activations += math.prod(self.out_shape) + math.prod(self.next_shape)
        weights = 9 * self.m * self.m + self.k * (self.m + self.proj + self.next)
        vectors = 8 * (self.m + self.k + self.next + (self.k if self.proj else 0))
        return self.dtype.itemsize * (activations + weights) + vectors

    def __str__(self) -> str:
        """A short line: ``chain 64->256->64 32x56x56 float16``."""
        parts = [f"chain {self.m}->{self.k}" + (f"->{self.next}" if self.next else "")]
        if self.proj:
            parts.append(f"project {self.proj}" + (f"/{self.step}" if self.step > 1 else ""))
        if self.stride > 1:
            parts.append(f"stride {self.stride}")
        parts += [f"{self.n}x{self.h}x{self.w}", str(self.dtype).removeprefix("torch.")]
        if self.store != "all":
            parts.append(self.store)
        return " ".join(parts)


Problem = ConvProblem | Conv3dProblem | AddReluProblem | ChainProblem
