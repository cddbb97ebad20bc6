"""The op ``fused_resnet::bottleneck_chain``: schema, shape rules, fake implementation, autocast.

    mid2     = relu(conv3x3(mid, weight2, stride, padding 1) * scale2 + shift2)
    shortcut = residual, or conv1x1(residual, weight_proj) * scale_proj + shift_proj
    whole    = relu(conv1x1(mid2, weight3) * scale3 + shift3 + shortcut)
    mid_next = relu(conv1x1(whole, weight_next) * scale_next + shift_next)
    out      = whole, its pixels of even row and column, or its mean over pixels

A bottleneck network cut just before each 3x3 convolution is a sequence of these. The op is for
inference and has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.ops import (
    _LIB,
    _autocast,
    _check_dense,
    _check_layout,
    _check_same,
    _describe,
    _layout_of,
    _remember,
    _remembered,
    channels_last,
    check_no_tangent,
)
from fused_resnet.problem import STORES, ChainProblem, channels_last_strides

_LIB.define(
    "bottleneck_chain(Tensor mid, Tensor residual, "
    "Tensor weight2, Tensor scale2, Tensor shift2, "
    "Tensor weight3, Tensor scale3, Tensor shift3, "
    "Tensor? weight_proj, Tensor? scale_proj, Tensor? shift_proj, "
    "Tensor? weight_next, Tensor? scale_next, Tensor? shift_next, "
    "SymInt stride, str store) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

#: Convolutions of a chain: name, and position of its weight, scale and shift among the arguments.
_CONVS = (("2", 2), ("3", 5), ("_proj", 8), ("_next", 11))


def _check_no_gradient(tensors: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "fused_resnet::bottleneck_chain is for inference and has no gradient, but an argument "
            "requires one; call it under torch.no_grad() or torch.inference_mode()"
        )
    check_no_tangent("bottleneck_chain", "the model that was not chained")


def _check_conv(
    name: str, triple: tuple[Tensor | None, ...], c: int, kernel: int, mid: Tensor
) -> int:
    """Validate one convolution's weight [K, c, kernel, kernel] and vectors [K]; returns K."""
    weight, scale, shift = triple
    if weight is None or scale is None or shift is None:
        raise ValueError(f"weight{name}, scale{name} and shift{name} must be given together")
    _check_dense(f"weight{name}", weight)
    _check_same(f"weight{name}", weight, mid, "mid")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (c, kernel, kernel) or not weight.shape[0]:
        raise ValueError(
            f"weight{name} must be [K, {c}, {kernel}, {kernel}], got {list(weight.shape)}"
        )
    vectors = torch.float64 if mid.dtype == torch.float64 else torch.float32
    for what, t in (("scale", scale), ("shift", shift)):
        _check_layout(what + name, t)
        if t.dtype != vectors:
            raise TypeError(f"{what}{name} must be {vectors}, got {_describe(t)}")
        if tuple(t.shape) != (weight.shape[0],):
            raise ValueError(f"{what}{name} must be [{weight.shape[0]}], got {_describe(t)}")
        if t.device != mid.device:
            raise ValueError(
                f"{what}{name} must be on the device of mid, {mid.device}; got {_describe(t)}"
            )
    return int(weight.shape[0])


def _problem(args: tuple[Tensor | None, ...], stride: int, store: str) -> ChainProblem:
    """The problem that valid arguments pose; ValueError or TypeError if they are not."""
    mid, residual = args[:2]
    assert mid is not None
    assert residual is not None
    _check_no_gradient(args)
    for name, t in (("mid", mid), ("residual", residual)):
        _check_dense(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name} must be [N, C, H, W], got {list(t.shape)}")
    _check_same("residual", residual, mid, "mid")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if store not in STORES:
        raise ValueError(f"unknown store {store!r}; one of {', '.join(STORES)}")
    n, m, h, w = mid.shape
    if h < 1 or w < 1:
        raise ValueError(f"mid has no pixels: {list(mid.shape)}")
    convs = {name: args[at : at + 3] for name, at in _CONVS}
    if _check_conv("2", convs["2"], m, 3, mid) != m:
        raise ValueError(f"weight2 must be [{m}, {m}, 3, 3]: mid has {m} channels")
    k = _check_conv("3", convs["3"], m, 1, mid)
    following = 0
    if any(t is not None for t in convs["_next"]):
        following = _check_conv("_next", convs["_next"], k, 1, mid)
        if store == "pool":
            raise ValueError("where the output is pooled there is no next block")
    size = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    proj, step = 0, 1
    sizes: tuple[tuple[int, int], ...] = (size,)
    if any(t is not None for t in convs["_proj"]):
        proj = int(residual.shape[1])
        if _check_conv("_proj", convs["_proj"], proj, 1, mid) != k:
            raise ValueError(f"weight_proj must be [{k}, {proj}, 1, 1]")
        sizes = (size, (h, w))
    given = tuple(residual.shape[2:])
    if residual.shape[0] != n or residual.shape[1] != (proj or k) or given not in sizes:
        wanted = " or ".join(str([n, proj or k, *s]) for s in dict.fromkeys(sizes))
        raise ValueError(f"residual must be {wanted}, got {_describe(residual)}")
    if proj and given != size:
        step = stride
    return ChainProblem(n, m, h, w, k, following, proj, stride, step, store, mid.dtype)


def _bottleneck_chain(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, stride, store = arguments
    args: tuple[Tensor | None, ...] = tuple(tensors)
    _check_no_gradient(args)
    key = ("chain", _layout_of(args), stride, store, backends.forced(), backends.generation())
    choice = _remembered.get(key)
    if choice is None:
        problem = _problem(args, stride, store)
        assert args[0] is not None
        choice = _remember(key, backends.choose("bottleneck_chain", problem, args[0].device))
    problem = choice.problem  # type: ignore[assignment]
    mid = args[0]
    assert isinstance(problem, ChainProblem)
    assert mid is not None
    if mid.shape[0] == 0:
        return _empty(mid, problem)
    out, following = backends.run(choice, *args)
    return channels_last(out), channels_last(following)


def _empty(mid: Tensor, problem: ChainProblem) -> tuple[Tensor, Tensor]:
    """Results without values: their shapes and strides."""
    shapes = problem.out_shape, problem.next_shape
    out, following = (mid.new_empty_strided(s, channels_last_strides(*s)) for s in shapes)
    return out, following


def _bottleneck_chain_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``mid_next`` of mid's dtype, dense in channels_last order.

    out is [N, K, OH, OW], for ``even`` [N, K, ceil(OH / 2), ceil(OW / 2)], for ``pool`` [N, K, 1,
    1]. mid_next is [N, NEXT, OH, OW], with NEXT 0 where there is no next block.
    """
    *tensors, stride, store = arguments
    return _empty(tensors[0], _problem(tuple(tensors), stride, store))


def _register() -> None:
    _LIB.impl("bottleneck_chain", _bottleneck_chain, "CompositeExplicitAutograd")
    torch.library.register_fake("fused_resnet::bottleneck_chain", _bottleneck_chain_fake, lib=_LIB)
    op = torch.ops.fused_resnet.bottleneck_chain.default
    vectors = tuple(at + i for _, at in _CONVS for i in (1, 2))
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIB.impl("bottleneck_chain", _autocast(op, device, vectors), key)


_register()
