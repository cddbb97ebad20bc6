"""What the nodes of a fused graph call: the functional layer, as forgiving as stock operators are.

`fused_resnet.functional` is strict: one shape, one dtype, [N, C, H, W]. Code that was written for
stock torch may broadcast a residual, promote dtypes or leave out the batch dimension; here such a
call is computed by the stock modules and operators, in the order and in the form in which it was
written.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from fused_resnet import functional
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
    conv: nn.Module,
    bn: nn.Module | None = None,
    act: Act = None,
    residual: Any = None,
    *,
    first_act: Act = None,
    add: Add = "add",
) -> Tensor:
    """``act(first_act(bn(conv(x))) + residual)``, each part if given, fused where tensors allow it.

    Args:
        x: [N, C, H, W]; anything else goes to the stock modules.
        conv: the convolution.
        bn: its norm, or None.
        act: activation at the end.
        residual: added before ``act``; of any shape and dtype that adds to the convolution's
            result.
        first_act: activation before the sum.
        add: which operand the sum was written into, if any.
    """
    if _is_traced(x):
        return _record(
            conv_bn_act, x, conv, bn, act, residual, **_given(first_act=first_act, add=add)
        )
    if _is_fusable_input(x):
        if residual is None:
            return functional.conv_bn_act(x, _as_conv(conv), bn, _module(act))
        if _fits(residual, x, conv):
            if first_act is None:
                return functional.conv_bn_act(x, _as_conv(conv), bn, _module(act), residual)
            if _is_relu(first_act) and _is_relu(act):
                return functional.conv_bn_act(
                    x, _as_conv(conv), bn, _RELU, residual, act_before_add=True
                )
        y = functional.conv_bn_act(x, _as_conv(conv), bn, _module(first_act))
    else:
        y = _stock(x, conv, bn, first_act)
    if residual is not None:
        if add == "add":
            y = y + residual
        elif add == "iadd":
            y += residual
        else:
            residual += y
            y = residual
    return _activate(y, act)


def conv_bn_act_maxpool(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: Act, pool: Pool
) -> Tensor:
    """``pool(act(bn(conv(x))))``, fused as far as modules and tensors allow.

    Args:
        x: [N, C, H, W]; anything else goes to the stock modules.
        conv: the convolution.
        bn: its norm, or None.
        act: activation before the pooling.
        pool: the pooling.
    """
    if _is_traced(x):
        return _record(conv_bn_act_maxpool, x, conv, bn, act, pool)
    pooling = pool_module(pool)
    if _is_fusable_input(x):
        return functional.conv_bn_act_maxpool(x, _as_conv(conv), bn, _module(act), pooling)
    return cast(Tensor, pooling(_stock(x, conv, bn, act)))


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


def _is_fusable_input(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point()


def _as_conv(module: nn.Module) -> nn.Conv2d:
    """The functional layer asks itself whether the module is a convolution that it knows."""
    return cast(nn.Conv2d, module)


def _module(act: Act) -> nn.Module | None:
    return _RELU if isinstance(act, str) else act


def _is_relu(act: Act) -> bool:
    return isinstance(act, str) or (type(act) is nn.ReLU and not functional._has_hooks(act))


def _activate(y: Tensor, act: Act) -> Tensor:
    if act is None:
        return y
    return torch.relu(y) if isinstance(act, str) else cast(Tensor, act(y))


def _stock(x: Tensor, conv: nn.Module, bn: nn.Module | None, act: Act) -> Tensor:
    y = conv(x)
    return _activate(y if bn is None else bn(y), act)


def _fits(residual: Any, x: Tensor, conv: nn.Module) -> bool:
    """Whether ``residual`` has the very shape, dtype and device of the result of ``conv``."""
    if not isinstance(residual, Tensor) or not isinstance(conv, nn.Conv2d):
        return False
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if residual.dtype != dtype or residual.device != x.device or residual.dim() != 4:
        return False
    if residual.shape[0] != x.shape[0] or residual.shape[1] != conv.out_channels:
        return False
    for i in (0, 1):
        padding: int | str = conv.padding if isinstance(conv.padding, str) else conv.padding[i]
        size = x.shape[2 + i]
        if padding != "same":
            pad = 0 if isinstance(padding, str) else padding
            size = conv_out_size(size, conv.kernel_size[i], conv.stride[i], pad, conv.dilation[i])
        if residual.shape[2 + i] != size:
            return False
    return True


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
