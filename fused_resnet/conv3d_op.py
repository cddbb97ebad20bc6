"""The op ``fused_resnet::conv3d_affine_act``: ``conv_affine_act`` for videos [N, C, D, H, W].

    z = conv3d(x, weight) * scale + shift, then an epilogue (see ``fused_resnet.problem.EPILOGUES``)

Its rules, gradients and the fallback are those of ``fused_resnet.ops``. Kernels for it are ATen's
own fused calls (backend ``library``) and stock ATen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.ops import (
    _LIB,
    Ints,
    _autocast,
    _check_conv,
    _check_epilogue,
    _conv_backward,
    _conv_setup,
    _layout_of,
    _register_autograd,
    _remember,
    _remembered,
    _vmap_conv,
    run_conv,
)
from fused_resnet.problem import Conv3dProblem, channels_last_strides

_LIB.define(
    "conv3d_affine_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
    "SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation, SymInt groups, str epilogue) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _triple(value: Ints) -> tuple[int, int, int]:
    return value[0], value[1], value[2]


def choose_conv3d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    epilogue: str,
) -> backends.Choice:
    """The kernel for a call of ``conv3d_affine_act``.

    Raises:
        ValueError: shapes, devices or parameters do not fit together.
        TypeError: a dtype is not supported or differs from x's.
    """
    key = (
        _layout_of((x, weight, scale, shift, residual)),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        epilogue,
        backends.forced(),
        backends.generation(),
    )
    choice = _remembered.get(key)
    if choice is None:
        size = _check_conv(x, weight, scale, shift, stride, padding, dilation, groups, space=3)
        _check_epilogue(x, residual, (x.shape[0], weight.shape[0], *size), epilogue)
        problem = Conv3dProblem(
            n=x.shape[0],
            c=x.shape[1],
            size=_triple(x.shape[2:]),
            k=weight.shape[0],
            kernel=_triple(weight.shape[2:]),
            stride=_triple(stride),
            padding=_triple(padding),
            dilation=_triple(dilation),
            groups=groups,
            epilogue=epilogue,
            dtype=x.dtype,
        )
        choice = _remember(key, backends.choose("conv3d_affine_act", problem, x.device))
    return choice


def _conv3d_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    epilogue: str,
) -> Tensor:
    choice = choose_conv3d(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, epilogue
    )
    return run_conv(choice, x, weight, scale, shift, residual)


def _conv3d_affine_act_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    epilogue: str,
) -> Tensor:
    """[N, K, OD, OH, OW] of x's dtype, dense in channels_last_3d order."""
    size = _check_conv(x, weight, scale, shift, stride, padding, dilation, groups, space=3)
    shape = (x.shape[0], weight.shape[0], *size)
    _check_epilogue(x, residual, shape, epilogue)
    return x.new_empty_strided(shape, channels_last_strides(*shape))


def _register() -> None:
    name = "conv3d_affine_act"
    op = torch.ops.fused_resnet.conv3d_affine_act.default
    _LIB.impl(name, _conv3d_affine_act, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_resnet::{name}", _conv3d_affine_act_fake, lib=_LIB)
    _LIB.impl(name, _autocast(op, "cpu", (2, 3)), "AutocastCPU")
    _LIB.impl(name, _autocast(op, "cuda", (2, 3)), "AutocastCUDA")
    _register_autograd(name, _conv_backward, _conv_setup)
    torch.library.register_vmap(f"fused_resnet::{name}", _vmap_conv(op, (0, 4)), lib=_LIB)


_register()
