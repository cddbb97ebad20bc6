"""What the nodes of a fused graph call: the functional layer, as forgiving as stock operators are.

`fused_resnet.functional` is strict: one shape, one dtype, [N, C, H, W]. Code that was written for
stock torch may broadcast a residual, promote dtypes or leave out the batch dimension; here such a
call is computed by the stock modules and operators, in the order and in the form in which it was
written.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet import fold, functional, hooks
from fused_resnet.problem import conv_out_size

#: An activation module, ``"relu"`` for one that was written as a function, or None.
Act = nn.Module | Literal["relu"] | None

#: How the sum was written: ``y + residual``, ``y += residual`` or ``residual += y``.
Add = Literal["add", "iadd", "residual_iadd"]

#: A pooling module, or (kernel, stride, padding) of a ``max_pool2d`` that was written as a
#: function.
Pool = nn.Module | tuple[Any, Any, Any]

_RELU = nn.ReLU()


def conv_bn_act(
    x: Tensor,
    conv: fold.Conv,
    bn: nn.Module | None = None,
    act: Act = None,
    residual: Any = None,
    *,
    first_act: Act = None,
    add: Add = "add",
) -> Tensor:
    """``act(first_act(bn(conv(x))) + residual)``, each part if given, fused where tensors allow it.

    Args:
        x: [N, C, H, W], or [N, C, D, H, W] for a 3-d convolution; anything else goes to the stock
            modules.
        conv: the convolution, or what stands in its place.
        bn: its norm, or None.
        act: activation at the end.
        residual: added before ``act``; of any shape and dtype that adds to the convolution's
            result.
        first_act: activation before the sum.
        add: which operand the sum was written into, if any.
    """
    # These few lines run for every convolution of a network: they call as little as they can.
    if type(x) is not Tensor and _is_traced(x):
        return _record(
            conv_bn_act, x, conv, bn, act, residual, **_given(first_act=first_act, add=add)
        )
    module = _RELU if act == "relu" else act
    if residual is None:
        return functional.conv_bn_act(x, conv, bn, module)
    if _fits(residual, x, conv):
        if first_act is None:
            return functional.conv_bn_act(x, conv, bn, module, residual)
        if _is_relu(first_act) and _is_relu(act):
            return functional.conv_bn_act(x, conv, bn, _RELU, residual, act_before_add=True)
    y = functional.conv_bn_act(x, conv, bn, _RELU if first_act == "relu" else first_act)
    if add == "add":
        y = y + residual
    elif add == "iadd":
        y += residual
    else:
        residual += y
        y = residual
    return y if module is None else cast(Tensor, module(y))


def conv_bn_act_maxpool(
    x: Tensor, conv: fold.Conv, bn: nn.Module | None, act: Act, pool: Pool
) -> Tensor:
    """``pool(act(bn(conv(x))))``, fused as far as modules and tensors allow.

    Args:
        x: [N, C, H, W]; anything else goes to the stock modules.
        conv: the convolution.
        bn: its norm, or None.
        act: activation before the pooling.
        pool: the pooling.
    """
    if type(x) is not Tensor and _is_traced(x):
        return _record(conv_bn_act_maxpool, x, conv, bn, act, pool)
    module = _RELU if act == "relu" else act
    return functional.conv_bn_act_maxpool(x, conv, bn, module, pool_module(pool))


def add_relu(a: Any, b: Any, act: Act = "relu", *, inplace: bool = False) -> Tensor:
    """``act(a + b)``; one pass over memory if both are alike and the activation is a ReLU.

    Args:
        a: first operand.
        b: second operand.
        act: the activation.
        inplace: whether the sum was written into ``a``.
    """
    if _is_traced(a) or _is_traced(b):
        return _record(add_relu, a, b, act, inplace=inplace)
    if (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.is_floating_point()
        and _is_relu(act)
    ):
        return functional.add_relu(a, b, inplace=inplace)
    if inplace:
        a += b
        return _activate(a, act)
    return _activate(a + b, act)


#: The functions above: calls of them in a graph are fused sites.
FUNCTIONS = (conv_bn_act, conv_bn_act_maxpool, add_relu)


def _is_traced(value: object) -> bool:
    return isinstance(value, fx.Proxy)


def _is_relu(act: Act) -> bool:
    return isinstance(act, str) or (type(act) is nn.ReLU and not hooks.is_seen(act))


def _activate(y: Tensor, act: Act) -> Tensor:
    if act is None:
        return y
    return torch.relu(y) if isinstance(act, str) else cast(Tensor, act(y))


def _fits(residual: Any, x: Tensor, conv: nn.Module) -> bool:
    """Whether ``residual`` has the very shape, dtype and device of the result of ``conv``."""
    if not isinstance(residual, Tensor) or not isinstance(conv, fold.Conv):
        return False
    dtype, device = x.dtype, x.device
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    shape, size = residual.shape, x.shape
    if residual.dtype != dtype or residual.device != device or not dtype.is_floating_point:
        return False
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    dims = len(kernel) + 2
    if len(shape) != dims or len(size) != dims or shape[:2] != (size[0], conv.out_channels):
        return False
    if conv.padding == "same":
        return shape[2:] == size[2:]
    pad: Any = (0,) * len(kernel) if conv.padding == "valid" else conv.padding
    made = map(conv_out_size, size[2:], kernel, stride, pad, dilation)
    return all(map(operator.eq, shape[2:], made))


_pools: dict[tuple[Any, Any, Any], nn.Module] = {}


def pool_module(pool: Pool) -> nn.Module:
    """A module for a pooling that was written as a function, made once; a module as it is."""
    if isinstance(pool, nn.Module):
        return pool
    module = _pools.get(pool)
    if module is None:
        module = _pools[pool] = nn.MaxPool2d(*pool)
    return module


def _given(*, first_act: Act, add: Add) -> dict[str, Any]:
    """Keyword arguments that differ from their defaults, so that printed graphs stay short."""
    given: dict[str, Any] = {} if add == "add" else {"add": add}
    return given if first_act is None else {"first_act": first_act, **given}


def _record(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Record a call as one node of the graph that its arguments are being traced into."""
    tracer = next(cast(fx.Tracer, a.tracer) for a in args if isinstance(a, fx.Proxy))

    def argument(a: Any) -> Any:
        if isinstance(a, nn.Module):
            return tracer.create_proxy("get_attr", tracer.path_of_module(a), (), {})
        return a

    return cast(
        Tensor,
        tracer.create_proxy(
            "call_function",
            function,
            tuple(map(argument, args)),
            {name: argument(a) for name, a in kwargs.items()},
        ),
    )
