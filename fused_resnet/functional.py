"""Functions behind the modules: each validates its arguments and calls one registered op.

`conv_affine_act`, `conv3d_affine_act`, `conv_affine_relu_maxpool` and `add_relu` take tensors.
`conv_bn_act` and `conv_bn_act_maxpool` take stock modules, so that parameters, hooks and train mode
stay those of the modules: where a batch norm uses batch statistics, or a module is not what these
functions know, the stock modules run, one after another, exactly as without fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from fused_resnet import chain_op as _chain_op  # noqa: F401  (registers the op)
from fused_resnet import conv3d_op as _conv3d_op  # noqa: F401  (registers the op)
from fused_resnet import fold, hooks, recall
from fused_resnet import ops as _ops
from fused_resnet.decompositions import decompositions

Size2 = int | tuple[int, int]
Size3 = int | tuple[int, int, int]
#: Weight, scale and shift of a convolution.
ConvAffine = tuple[Tensor, Tensor, Tensor]

_conv_op = torch.ops.fused_resnet.conv_affine_act.default
_conv3d_op_overload = torch.ops.fused_resnet.conv3d_affine_act.default
_stem_op = torch.ops.fused_resnet.conv_affine_relu_maxpool.default
_chain_op_overload = torch.ops.fused_resnet.bottleneck_chain.default
_add_relu_op = torch.ops.fused_resnet.add_relu.default
_add_relu_inplace_op = torch.ops.fused_resnet.add_relu_.default


def _extents(name: str, value: Any, what: str) -> tuple[int, ...]:
    """The value for each dimension of space, of which ``what`` tells: "a pair (height, width)"."""
    space = what.count(",") + 1
    extents = (value,) * space if isinstance(value, int | torch.SymInt) else value
    if (
        not isinstance(extents, Sequence)
        or len(extents) != space
        or not all(isinstance(v, int | torch.SymInt) for v in extents)
    ):
        raise ValueError(f"{name} must be an int or {what}, got {value!r}")
    return tuple(extents)


def _pair(name: str, value: Any) -> tuple[int, ...]:
    return _extents(name, value, "a pair (height, width)")


def _triple(name: str, value: Any) -> tuple[int, ...]:
    return _extents(name, value, "a triple (depth, height, width)")


def _same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after a dimension that keep its length at stride 1; odd totals go behind."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def conv_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    epilogue: str = "relu",
) -> Tensor:
    """Convolution, per-channel affine map, residual and ReLU in one pass.

    ``z = conv(x, weight) * scale + shift``; the epilogue makes of it ``none``: z, ``relu``:
    relu(z), ``add``: z + r, ``add_relu``: relu(z + r), ``relu_add_relu``: relu(relu(z) + r).
    Accumulation and epilogue are fp32 (float64 for float64 inputs), with one rounding at the end
    where a fused kernel runs.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64, any strides (channels_last is best).
        weight: [K, C / groups, R, S], of x's dtype.
        scale: [K], float32 (float64 if x is).
        shift: [K], as scale.
        residual: [N, K, OH, OW], of x's dtype, for the epilogues that add.
        stride: of the window, int or (height, width).
        padding: zeros on each side, int or (height, width), or ``"same"`` or ``"valid"``.
        dilation: spacing of the window's taps.
        groups: blocked connections from input to output channels.
        epilogue: one of ``fused_resnet.problem.EPILOGUES``.

    Returns:
        [N, K, OH, OW] of x's dtype, dense in channels_last order.

    Raises:
        ValueError: shapes, devices or parameters do not fit together.
        TypeError: a dtype is not supported or differs from x's.

    Example:
        >>> x = torch.randn(1, 3, 32, 32)
        >>> w, scale, shift = torch.randn(8, 3, 3, 3), torch.ones(8), torch.zeros(8)
        >>> conv_affine_act(x, w, scale, shift, padding=1).shape
        torch.Size([1, 8, 32, 32])
    """
    steps, spacing = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        x, zeros = _named_padding(padding, x, weight, steps, spacing)
    else:
        zeros = _pair("padding", padding)
    arguments = (x, weight, scale, shift, residual, steps, zeros, spacing, groups, epilogue)
    return cast(Tensor, _call(_conv_op, *arguments))


def _named_padding(
    name: str, x: Tensor, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the zeros on each side that the padding "same" or "valid" comes to."""
    space = len(stride)
    if name == "valid" or x.dim() != space + 2 or weight.dim() != space + 2:
        return x, (0,) * space  # the op names what is wrong with a rank
    if name != "same":
        raise ValueError(f"padding must be a size, 'same' or 'valid', got {name!r}")
    if set(stride) != {1}:
        raise ValueError(f"padding 'same' needs stride 1, got {stride}")
    return _padded_alike(x, weight.shape[2:], dilation)


def _padded_alike(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the zeros on each side that keep its extents; uneven ones it gets at once."""
    before, behind = zip(*map(_same_padding, kernel, dilation), strict=True)
    if before == behind:
        return x, before
    # F.pad takes both sides of the last dimension first.
    sides = [side for pair in zip(before[::-1], behind[::-1], strict=True) for side in pair]
    return F.pad(x, sides), (0,) * len(before)


def conv3d_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Size3 = 1,
    padding: Size3 | str = 0,
    dilation: Size3 = 1,
    groups: int = 1,
    epilogue: str = "relu",
) -> Tensor:
    """`conv_affine_act` for videos: a 3-d convolution and all that follows it.

    Args:
        x: [N, C, D, H, W], float32, float16, bfloat16 or float64, any strides (channels_last_3d is
            best).
        weight: [K, C / groups, T, R, S], of x's dtype.
        scale: [K], float32 (float64 if x is).
        shift: [K], as scale.
        residual: [N, K, OD, OH, OW], of x's dtype, for the epilogues that add.
        stride: of the window, int or (depth, height, width).
        padding: zeros on each side, int or (depth, height, width), or ``"same"`` or ``"valid"``.
        dilation: spacing of the window's taps.
        groups: blocked connections from input to output channels.
        epilogue: one of ``fused_resnet.problem.EPILOGUES``.

    Returns:
        [N, K, OD, OH, OW] of x's dtype, dense in channels_last_3d order.

    Raises:
        ValueError: shapes, devices or parameters do not fit together.
        TypeError: a dtype is not supported or differs from x's.

    Example:
        >>> x = torch.randn(1, 3, 8, 32, 32)
        >>> w, scale, shift = torch.randn(8, 3, 3, 3, 3), torch.ones(8), torch.zeros(8)
        >>> conv3d_affine_act(x, w, scale, shift, padding=1).shape
        torch.Size([1, 8, 8, 32, 32])
    """
    steps, spacing = _triple("stride", stride), _triple("dilation", dilation)
    if isinstance(padding, str):
        x, zeros = _named_padding(padding, x, weight, steps, spacing)
    else:
        zeros = _triple("padding", padding)
    arguments = (x, weight, scale, shift, residual, steps, zeros, spacing, groups, epilogue)
    return cast(Tensor, _call(_conv3d_op_overload, *arguments))


def conv_affine_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: Size2 = 2,
    padding: Size2 = 3,
    dilation: Size2 = 1,
    groups: int = 1,
    pool_kernel: Size2 = 3,
    pool_stride: Size2 = 2,
    pool_padding: Size2 = 1,
) -> Tensor:
    """The stem of a ResNet: ``max_pool(relu(conv(x, weight) * scale + shift))``.

    The defaults are ResNet's: a 7x7 convolution of stride 2 and padding 3, a 3x3 window of stride
    2.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S].
        scale: [K], float32 (float64 if x is).
        shift: [K], as scale.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
        pool_kernel: window of the max-pooling.
        pool_stride: stride of the max-pooling.
        pool_padding: padding of the max-pooling, at most half of its window.

    Returns:
        [N, K, PH, PW] of x's dtype, dense in channels_last order.

    Raises:
        ValueError: shapes, devices or parameters do not fit together.
        TypeError: a dtype is not supported or differs from x's.

    Example:
        >>> x, w = torch.randn(1, 3, 224, 224), torch.randn(64, 3, 7, 7)
        >>> conv_affine_relu_maxpool(x, w, torch.ones(64), torch.zeros(64)).shape
        torch.Size([1, 64, 56, 56])
    """
    return cast(
        Tensor,
        _call(
            _stem_op,
            x,
            weight,
            scale,
            shift,
            _pair("stride", stride),
            _pair("padding", padding),
            _pair("dilation", dilation),
            groups,
            _pair("pool_kernel", pool_kernel),
            _pair("pool_stride", pool_stride),
            _pair("pool_padding", pool_padding),
        ),
    )


def add_relu(a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
    """``relu(a + b)`` in one pass over memory.

    Args:
        a: any shape, float32, float16, bfloat16 or float64.
        b: of a's shape, dtype and device.
        inplace: write the result into a (only where no gradient is needed).

    Returns:
        The sum's positive part, with a's shape and memory layout; a itself with ``inplace``.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: dtypes differ or are not floating.

    Example:
        >>> add_relu(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([0., 2.])
    """
    if not inplace:
        return cast(Tensor, _call(_add_relu_op, a, b))
    if _differentiating() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        _ops.check_add(a, b)
        # relu_'s backward reads its output and add_'s reads nothing: stock in-place ops do.
        return a.add_(b).relu_()
    _add_relu_inplace_op(a, b)
    return a


def _call(op: Any, *args: Any) -> Any:
    """Call ``op``; where no gradient can be asked for, without a detour through autograd's Python.

    With gradients off, an op's autograd key does nothing but call the op once more, from Python,
    which costs as much as a small convolution. The ops have no forward-mode derivatives, and know
    nothing of torch.func.grad: what they are made of takes their place there.
    """
    if torch.compiler.is_compiling():  # First: torch.compile cannot trace what comes next.
        return op(*args)
    if _differentiating():
        return _PARTS[op](*args)
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or fold.transformed():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


_PARTS = decompositions()


def _differentiating() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func other than vmap are asked for.

    Both work even where gradients are off.
    """
    if forward_ad._current_level >= 0:
        return True
    if not fold.transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


def _is_relu(act: object) -> bool:
    return type(act) is nn.ReLU and not hooks.is_seen(act)


def _autocasts(conv: nn.Module) -> bool:
    device = fold.weight_of(cast(fold.Conv, conv)).device
    return torch.is_autocast_enabled(device.type)


def why_stock(conv: nn.Module, bn: nn.Module | None) -> str | None:
    """None if ``conv`` and ``bn``, as they are now, run as one fused op, else why they do not."""
    if not fold.is_plain_conv(conv):
        stock = "nn.Conv3d" if isinstance(conv, nn.Conv3d) else "nn.Conv2d"
        return f"{type(conv).__name__} is not a plain {stock}"
    reason = fold.why_not_behind(conv, bn)
    if reason is not None:
        return reason
    if fold.uses_batch_statistics(bn):
        return "the batch norm is in train mode and normalises by the batch's statistics"
    if fold.is_frozen_norm(type(bn)) and _autocasts(conv):
        return "under autocast a frozen batch norm promotes its input to the dtype of its buffers"
    if hooks.is_on(conv) or (bn is not None and hooks.is_on(bn)):
        return "a hook is registered on the convolution or the batch norm"
    if hooks.is_everywhere():
        return "a hook is registered for all modules"
    return None


def _is_fused(conv: nn.Module, bn: nn.Module | None) -> bool:
    """Whether `why_stock` has nothing to say; quicker for the modules that most models have."""
    if (
        type(conv) is nn.Conv2d
        and type(bn) is nn.BatchNorm2d
        and not (bn.training or bn._buffers["running_mean"] is None)
        and not (hooks.is_on(conv) or hooks.is_seen(bn))
    ):
        return True
    return why_stock(conv, bn) is None


def _unpadded(x: Tensor, conv: fold.Conv) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the symmetric zero padding that the op is to apply to it."""
    padding = conv.padding
    if conv.padding_mode == "zeros":
        if type(padding) is tuple:
            return x, padding
        if padding == "valid":
            return x, (0,) * len(conv.stride)
        return _padded_alike(x, conv.kernel_size, conv.dilation)
    # Convolutions keep the pads of both sides, last dimension first, as F.pad takes them.
    pads = conv._reversed_padding_repeated_twice
    return F.pad(x, pads, mode=conv.padding_mode), (0,) * len(conv.stride)


def conv_bn_act(
    x: Tensor,
    conv: fold.Conv,
    bn: nn.Module | None,
    act: nn.Module | None = None,
    residual: Tensor | None = None,
    *,
    act_before_add: bool = False,
) -> Tensor:
    """``act(bn(conv(x)) + residual)``, fused where the modules allow it.

    In eval mode convolution, batch norm, residual and ReLU are one op. The stock modules run
    instead, in the same order and to the same result, where the batch norm uses batch statistics,
    where a module is of another kind (group norm, a convolution with its own forward) or carries
    hooks; an activation other than ReLU is called on the fused result. `why_stock` tells the
    reason.

    Args:
        x: [N, C, H, W], or [N, C, D, H, W] for a 3-d convolution.
        conv: the convolution; bias, "same" and "valid" padding and every padding_mode are honoured.
        bn: batch norm or another norm, or None.
        act: activation module, or None for none.
        residual: [N, K, OH, OW] (or [N, K, OD, OH, OW]) to add before the activation, or None.
        act_before_add: apply the activation before the addition too, as in the textbook block
            ``relu(relu(bn(conv(x))) + residual)``.

    Returns:
        [N, K, OH, OW] or [N, K, OD, OH, OW] of x's dtype (of the autocast dtype under autocast).

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.

    Example:
        >>> conv, bn, relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        >>> y = conv_bn_act(torch.randn(1, 3, 32, 32), conv.eval(), bn.eval(), relu)
    """
    if not torch.compiler.is_compiling():
        recalled = recall.recall(x, conv, bn, act, residual, act_before_add)
        if recalled is not None:
            return recalled
    if type(x) is not Tensor and _is_proxy(x):
        return _traced(conv_bn_act, x, conv, bn, act, residual, act_before_add=act_before_add)
    if type(bn) is not nn.BatchNorm2d and bn is not None and (own := fold.activations_of(bn)):
        return _conv_norm_act(x, conv, bn, own, act, residual, act_before_add)
    relu = act is None or _is_relu(act)
    video = isinstance(conv, nn.Conv3d)
    # Stock convolutions take an image without a batch dimension; the op does not.
    if x.dim() != (5 if video else 4) or not _is_fused(conv, bn) or (act_before_add and not relu):
        y: Tensor = conv(x)
        if bn is not None:
            y = bn(y)
        if residual is None:
            return y if act is None else cast(Tensor, act(y))
        if act is None:
            return y + residual
        return cast(Tensor, act((act(y) if act_before_add else y) + residual))
    if act is None or not relu:
        epilogue = "none" if residual is None else "add"
    elif residual is None:
        epilogue = "relu"
    else:
        epilogue = "relu_add_relu" if act_before_add else "add_relu"
    padded, constants, geometry = _arguments(x, conv, bn, epilogue)
    y = _call(_conv3d_op_overload if video else _conv_op, padded, *constants, residual, *geometry)
    if not relu:
        assert act is not None
        return cast(Tensor, act(y))
    if (
        padded is x
        and not video
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
    ):
        recall.remember(x, conv, bn, act, residual, act_before_add, constants, geometry)
    return y


def _arguments(
    x: Tensor, conv: fold.Conv, bn: nn.Module | None, epilogue: str
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """What the op takes for modules that `why_stock` has nothing against.

    Returns:
        The padded input; weight, scale and shift; stride and all that follows it.
    """
    padded, padding = _unpadded(x, conv)
    constants = (fold.weight_of(conv), *fold.affine_of(conv, bn))
    return padded, constants, (conv.stride, padding, conv.dilation, conv.groups, epilogue)


def _conv_norm_act(
    x: Tensor,
    conv: fold.Conv,
    norm: nn.Module,
    own: tuple[nn.Module, ...],
    act: nn.Module | None,
    residual: Tensor | None,
    act_before_add: bool,
) -> Tensor:
    """`conv_bn_act` for a norm that ends in activations of its ``own``, as those of timm do."""
    first = own if act is None or not act_before_add else (*own, act)
    relu = all(map(_is_relu, first))

    def fused(residual: Tensor | None, epilogue: str) -> Tensor:
        padded, constants, geometry = _arguments(x, conv, norm, epilogue)
        return cast(Tensor, _call(_conv_op, padded, *constants, residual, *geometry))

    if x.dim() != 4 or not _is_fused(conv, norm):
        y: Tensor = norm(conv(x))
        for module in first[len(own) :]:
            y = module(y)
    elif relu and residual is not None and act is not None and _is_relu(act):
        return fused(residual, "relu_add_relu")
    else:
        y = fused(None, "relu" if relu else "none")
        for module in () if relu else first:
            y = module(y)
    if residual is not None:
        y = y + residual
    return y if act is None else cast(Tensor, act(y))


def conv_bn_act_maxpool(
    x: Tensor, conv: fold.Conv, bn: nn.Module | None, act: nn.Module | None, pool: nn.Module
) -> Tensor:
    """``pool(act(bn(conv(x))))``, the stem of a ResNet, fused where the modules allow it.

    One op if ``act`` is a ReLU and ``pool`` a plain ``nn.MaxPool2d`` (no dilation, no ceil_mode, no
    indices); otherwise `conv_bn_act`, then ``pool``.

    Args:
        x: [N, C, H, W].
        conv: the convolution.
        bn: its batch norm, or None.
        act: activation module, or None.
        pool: pooling module, or any other module.

    Returns:
        [N, K, PH, PW].

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.
    """
    if _is_proxy(x):
        return _traced(conv_bn_act_maxpool, x, conv, bn, act, pool)
    acts = () if act is None else (act,)
    if type(bn) is not nn.BatchNorm2d:
        acts = (*fold.activations_of(bn), *acts)
    if (
        x.dim() != 4
        or isinstance(conv, nn.Conv3d)
        or not acts
        or not all(map(_is_relu, acts))
        or why_not_poolable(pool) is not None
        or not _is_fused(conv, bn)
    ):
        return cast(Tensor, pool(conv_bn_act(x, conv, bn, act)))
    x, padding = _unpadded(x, conv)
    scale, shift = fold.affine_of(conv, bn)
    return cast(
        Tensor,
        _call(
            _stem_op,
            x,
            fold.weight_of(conv),
            scale,
            shift,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            _pair("kernel_size", pool.kernel_size),
            _pair("stride", pool.stride),
            _pair("padding", pool.padding),
        ),
    )


def why_not_poolable(pool: nn.Module) -> str | None:
    """None if ``pool`` can be fused into the stem's op, else the reason why not."""
    if type(pool) is not nn.MaxPool2d:
        return f"{type(pool).__name__} is not nn.MaxPool2d"
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return "the pooling has dilation, ceil_mode or return_indices"
    if hooks.is_seen(pool):
        return "a hook is registered on the pooling"
    return None


def _is_proxy(x: object) -> bool:
    return isinstance(x, fx.Proxy)


def _traced(function: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Record a call of ``function`` as one node of the graph that ``x`` is being traced into.

    Modules become get_attr nodes, so that the graph names the very modules that it uses.
    """
    tracer = cast(fx.Tracer, x.tracer)

    def argument(a: Any) -> Any:
        if isinstance(a, nn.Module):
            return tracer.create_proxy("get_attr", tracer.path_of_module(a), (), {})
        return a

    proxy = tracer.create_proxy("call_function", function, (x, *map(argument, args)), kwargs)
    return cast(Tensor, proxy)


def bottleneck_chain(
    mid: Tensor,
    residual: Tensor,
    conv2: ConvAffine,
    conv3: ConvAffine,
    *,
    projection: ConvAffine | None = None,
    following: ConvAffine | None = None,
    stride: int = 1,
    store: str = "all",
) -> tuple[Tensor, Tensor]:
    """A bottleneck from its 3x3 convolution on, and the first 1x1 of the next one, in one kernel.

    With the affine maps as in `conv_affine_act`: mid2 = relu(conv2(mid)), whole = relu(conv3(mid2)
    + shortcut), mid_next = relu(following(whole)), where the shortcut is ``residual``, or
    ``projection(residual)``. The 3x3 has padding 1. For inference: there is no gradient.

    Args:
        mid: [N, M, H, W], float32, float16, bfloat16 or float64.
        residual: [N, K, OH, OW] of mid's dtype; with a projection the block's input, [N, C, H, W]
            or, where only its sampled pixels were kept, [N, C, OH, OW].
        conv2: weight [M, M, 3, 3], and its fp32 scale and shift [M].
        conv3: weight [K, M, 1, 1], scale and shift [K].
        projection: weight [K, C, 1, 1], scale and shift [K]; its stride is ``stride``.
        following: weight [NEXT, K, 1, 1], scale and shift [NEXT].
        stride: of the 3x3.
        store: what is kept of the block's output: ``all`` of it, its ``even`` rows and columns
            (which is all that a following projection of stride 2 reads), or the mean over its
            pixels, ``pool`` (nothing may follow then).

    Returns:
        ``out`` [N, K, OH, OW], or [N, K, ceil(OH / 2), ceil(OW / 2)], or [N, K, 1, 1]; and
        ``mid_next`` [N, NEXT, OH, OW], with NEXT 0 if nothing follows.

    Raises:
        ValueError: shapes, devices or parameters do not fit together.
        TypeError: a dtype is not supported or differs from mid's.
        RuntimeError: an argument requires a gradient, and gradients are on.

    Example:
        >>> def conv(k, c, r):
        ...     return torch.randn(k, c, r, r), torch.ones(k), torch.zeros(k)
        >>> mid, x = torch.randn(1, 64, 8, 8), torch.randn(1, 256, 8, 8)
        >>> out, mid_next = bottleneck_chain(
        ...     mid, x, conv(64, 64, 3), conv(256, 64, 1), following=conv(64, 256, 1)
        ... )
        >>> out.shape, mid_next.shape
        (torch.Size([1, 256, 8, 8]), torch.Size([1, 64, 8, 8]))
    """
    absent = (None, None, None)
    projected, next_ = projection or absent, following or absent
    out, mid_next = _chain_op_overload(
        mid, residual, *conv2, *conv3, *projected, *next_, stride, store
    )
    return out, mid_next
