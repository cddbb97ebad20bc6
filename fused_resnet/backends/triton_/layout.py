"""Memory layouts of images and weights as each path wants them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.problem import ConvProblem

from .device import on_device
from .launch import bind
from .plans import Rows, pad_launch


def matrix(tensor: Tensor, rows: int, cols: int, box: tuple[int, int]) -> TensorDescriptor:
    """Descriptor of dense memory seen as [rows, cols], moved in boxes of this shape."""
    return TensorDescriptor(tensor, [rows, cols], [cols, 1], [*box])


def parity_view(x: Tensor, stride: tuple[int, int], box: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor of a dense channels_last x as [n, h / sh, sh, w / sw, sw * c], moved in boxes.

    The stride (sh, sw) divides h and w. Dimension 2 and the blocks of c channels in the last one
    are what a row's and a column's number leave when divided by the stride.
    """
    (n, c, h, w), (sh, sw) = x.shape, stride
    shape = [n, h // sh, sh, w // sw, sw * c]
    return TensorDescriptor(x, shape, [h * w * c, sh * w * c, w * c, sw * c, 1], [*box])


def tap_weights(problem: ConvProblem, weight: Tensor, merged: int) -> Tensor:
    """Weight [K, C, R, S] as dense [K, R, S, merged * C], channels innermost.

    With ``merged`` groups taken as one, the C channels of each output channel's own group stand at
    that group's place and the others are zero: a block-diagonal matrix.
    """
    taps = weight.detach().permute(0, 2, 3, 1)
    if merged == 1:
        return taps.contiguous()
    k, r, s, c = taps.shape
    packed = taps.new_zeros(k, r, s, merged, c)
    channel = torch.arange(k, device=weight.device)
    packed[channel, :, :, channel // (k // problem.groups) % merged] = taps
    return packed.view(k, r, s, merged * c)


def row_weights(problem: ConvProblem, weight: Tensor, rows: Rows) -> Tensor:
    """Weight [K, C, R, S] as dense [K, rows, seg]: S * cp products of a filter row, and zeros."""
    k, c, r, s = weight.shape
    packed = weight.new_zeros(k, rows.rows, rows.seg)
    runs = packed[:, :r, : s * rows.cp].view(k, r, s, rows.cp)
    runs[..., :c] = weight.detach().permute(0, 2, 3, 1)
    return packed


def padded_image(
    x: Tensor,
    padded: tuple[int, int, int],
    origin: tuple[int, int],
    dtype: torch.dtype,
    affine: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A dense zero-bordered image [N, hp, wp, cp] in ``dtype`` of x [N, C, H, W].

    x may have any strides, ``padded`` is (hp, wp, cp) and x's first pixel lands at ``origin``. With
    ``affine`` = (factor, offset), fp32 [C], pixels become x * factor + offset. The border and
    channels from C on are zero.
    """
    n, _, h, w = x.shape
    hp, wp, cp = padded
    y = torch.empty((n, hp, wp, cp), dtype=dtype, device=x.device)
    factor, offset = affine if affine is not None else (y, y)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start = _pad_start(tuple(x.shape), padded, x.dtype, dtype, extent, affine is not None, x.device)
    with on_device(x.device):
        start(
            x, factor, offset, y, n * hp * wp, h, w, hp, wp, origin[0], origin[1], *x.stride()
        )  # fmt: skip
    return y


@lru_cache(maxsize=256)
def _pad_start(
    shape: tuple[int, ...],
    padded: tuple[int, int, int],
    source: torch.dtype,
    dtype: torch.dtype,
    extent: int,
    normalise: bool,
    device: torch.device,
) -> Callable[..., None]:
    launch = pad_launch(shape, padded, source, dtype, extent, normalise)
    with on_device(device):
        return bind(launch, device)
