"""The ops in terms of ATen, for exporters and compilers that know only ATen, such as ONNX's.

Source of the mechanism: ``torch.export.ExportedProgram.run_decompositions``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet import conv3d_op as _conv3d_op  # noqa: F401  registers it and the other ops
from fused_resnet.numerics import apply_epilogue, per_channel


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What the ops of this package are made of, by op.

    An exported program holds ``fused_resnet::...`` ops, which only torch with this package can run.
    Decomposed it holds convolutions, products, sums and ReLUs of ATen: what other runtimes take,
    and fuse in their own way.

    Returns:
        A new dict, to pass to ``run_decompositions``.

    Example:
        >>> program = torch.export.export(fused_resnet.fuse(model), (images,))
        >>> program = program.run_decompositions(fused_resnet.decompositions())
        >>> torch.onnx.export(program, f="model.onnx", dynamo=True)
    """
    ops = torch.ops.fused_resnet
    return {
        ops.conv_affine_act.default: _conv_affine_act,
        ops.conv3d_affine_act.default: _conv_affine_act,
        ops.conv_affine_relu_maxpool.default: _conv_affine_relu_maxpool,
        ops.add_relu.default: _add_relu,
    }


def _conv_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epilogue: str,
) -> Tensor:
    conv: Callable[..., Tensor] = torch.conv3d if x.dim() == 5 else torch.conv2d
    y = conv(x, weight, None, stride, padding, dilation, groups)
    # In the dtype of scale: it is not rounded to half precision.
    z = y.to(scale.dtype) * per_channel(scale, y) + per_channel(shift, y)
    return apply_epilogue(z, residual, epilogue).to(x.dtype)


def _conv_affine_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> Tensor:
    y = _conv_affine_act(x, weight, scale, shift, None, stride, padding, dilation, groups, "relu")
    return torch.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def _add_relu(a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(a + b)
