"""The registered ops: schemas, shape rules, fake implementations, gradients and autocast.

``fused_resnet::conv_affine_act``
    z = conv(x, weight) * scale + shift, then an epilogue (see ``fused_resnet.problem.EPILOGUES``).
``fused_resnet::conv_affine_relu_maxpool``
    max_pool(relu(conv(x, weight) * scale + shift)), the stem of a ResNet.
``fused_resnet::add_relu``, ``fused_resnet::add_relu_``
    relu(a + b), out of place and into a.

The ops are defined here and not in C++, so that they exist without a compiled extension. Arguments
are validated once per distinct combination of shapes, dtypes, devices and parameters; the choice
of the kernel is remembered with it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library import autograd as library_autograd
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from fused_resnet import _build, backends
from fused_resnet.freshness import Snapshot, keep, persistent
from fused_resnet.numerics import per_channel
from fused_resnet.problem import (
    DTYPES,
    EPILOGUES,
    RESIDUAL_EPILOGUES,
    AddReluProblem,
    Convolution,
    ConvProblem,
    MaxPool,
    channels_last_format,
    channels_last_strides,
    conv_out_size,
)

_LIB = torch.library.Library("fused_resnet", "DEF")

_LIB.define(
    "conv_affine_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str epilogue) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "conv_affine_relu_maxpool(Tensor x, Tensor weight, Tensor scale, Tensor shift, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "SymInt[2] pool_kernel, SymInt[2] pool_stride, SymInt[2] pool_padding) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define("add_relu(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("add_relu_(Tensor(a!) a, Tensor b) -> ()", tags=(torch.Tag.pt2_compliant_tag,))

Ints = Sequence[int]

# --------------------------------------------------------------------------------------------------
# Validation: shared by the real and the fake implementations.
# --------------------------------------------------------------------------------------------------


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"


#: By dimensions of space: their names, the shape of x and the shape of a weight.
_NAMES = {
    2: ("height, width", "[N, C, H, W]", "[K, C / groups, R, S]"),
    3: ("depth, height, width", "[N, C, D, H, W]", "[K, C / groups, T, R, S]"),
}


def _check_extents(name: str, value: Ints, least: int, space: int = 2) -> None:
    if len(value) != space:
        raise ValueError(f"{name} must have {space} values ({_NAMES[space][0]}), got {list(value)}")
    if any(v < least for v in value):
        raise ValueError(f"{name} must be at least {least}, got {list(value)}")


def _check_same(name: str, t: Tensor, x: Tensor, what: str = "x") -> None:
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {what}, {x.dtype}; got {_describe(t)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of {what}, {x.device}; got {_describe(t)}")


def _check_layout(name: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {t.layout}")


def _check_dense(name: str, t: Tensor) -> None:
    _check_layout(name, t)
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or float64, got {_describe(t)}; "
            "convert it first, for example with .float()"
        )


def _check_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    space: int = 2,
) -> tuple[int, ...]:
    """Validate a convolution's arguments and return the extents in space of its result."""
    _check_dense("x", x)
    _, image, window = _NAMES[space]
    if x.dim() != space + 2:
        raise ValueError(f"x must be {image}, got {x.dim()} dimensions: {list(x.shape)}")
    if weight.dim() != space + 2:
        raise ValueError(
            f"weight must be {window}, got {weight.dim()} dimensions: {list(weight.shape)}"
        )
    _check_dense("weight", weight)
    _check_same("weight", weight, x)
    _check_extents("stride", stride, 1, space)
    _check_extents("padding", padding, 0, space)
    _check_extents("dilation", dilation, 1, space)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    c, (k, c_group, *kernel) = x.shape[1], weight.shape
    if c != c_group * groups:
        raise ValueError(
            f"x has {c} channels but weight {list(weight.shape)} with groups={groups} "
            f"takes {c_group * groups}"
        )
    if k % groups != 0 or k < 1:
        raise ValueError(f"weight's {k} output channels must be a positive multiple of {groups=}")
    if any(extent < 1 for extent in kernel):
        least = "x".join("1" * space)
        raise ValueError(f"weight's kernel must be at least {least}, got {list(weight.shape)}")
    vectors = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("scale", scale), ("shift", shift)):
        _check_layout(name, t)
        if t.dtype != vectors:
            raise TypeError(
                f"{name} must be {vectors} for x of {x.dtype} (it is never rounded to half "
                f"precision), got {_describe(t)}"
            )
        if t.dim() != 1 or t.shape[0] != k:
            raise ValueError(
                f"{name} must be [{k}], one value an output channel; got {_describe(t)}"
            )
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {_describe(t)}")
    size = tuple(map(conv_out_size, x.shape[2:], kernel, stride, padding, dilation))
    if any(extent < 1 for extent in size):
        window, made = ("x".join(map(str, extents)) for extents in (kernel, size))
        raise ValueError(
            f"the kernel {window} (dilation {list(dilation)}) does not fit into x {list(x.shape)} "
            f"with padding {list(padding)}: the result would be {made}"
        )
    return size


def _check_epilogue(
    x: Tensor, residual: Tensor | None, shape: Sequence[int], epilogue: str
) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"unknown epilogue {epilogue!r}; one of {', '.join(EPILOGUES)}")
    if epilogue in RESIDUAL_EPILOGUES:
        if residual is None:
            raise ValueError(f"epilogue {epilogue!r} needs a residual, got None")
        _check_layout("residual", residual)
        _check_same("residual", residual, x)
        if tuple(residual.shape) != tuple(shape):
            raise ValueError(
                f"residual must have the result's shape {list(shape)}, got {_describe(residual)}"
            )
    elif residual is not None:
        raise ValueError(f"epilogue {epilogue!r} takes no residual, got {_describe(residual)}")


def _check_pool(pool: MaxPool, oh: int, ow: int) -> tuple[int, int]:
    _check_extents("pool_kernel", pool.kernel, 1)
    _check_extents("pool_stride", pool.stride, 1)
    _check_extents("pool_padding", pool.padding, 0)
    for i in (0, 1):
        if pool.padding[i] > pool.kernel[i] // 2:
            raise ValueError(
                f"pool_padding must be at most half of pool_kernel {list(pool.kernel)}, "
                f"got {list(pool.padding)}"
            )
    ph = conv_out_size(oh, pool.kernel[0], pool.stride[0], pool.padding[0], 1)
    pw = conv_out_size(ow, pool.kernel[1], pool.stride[1], pool.padding[1], 1)
    if ph < 1 or pw < 1:
        raise ValueError(f"the pooling window {list(pool.kernel)} does not fit into {oh}x{ow}")
    return ph, pw


def check_add(a: Tensor, b: Tensor) -> None:
    """Raise ValueError or TypeError where ``add_relu`` cannot take a and b."""
    _check_dense("a", a)
    _check_layout("b", b)
    _check_same("b", b, a, "a")
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {list(a.shape)} and {list(b.shape)}")


# --------------------------------------------------------------------------------------------------
# Real implementations.
# --------------------------------------------------------------------------------------------------

#: Distinct calls remembered; a server that sees ever new shapes must not grow without bound.
_MAX_REMEMBERED = 4096
_remembered: dict[tuple[Any, ...], backends.Choice] = {}


def _remember(key: tuple[Any, ...], choice: backends.Choice) -> backends.Choice:
    if len(_remembered) >= _MAX_REMEMBERED:
        _remembered.clear()
    _remembered[key] = choice
    return choice


def _pair(value: Ints) -> tuple[int, int]:
    return value[0], value[1]


def channels_last(y: Tensor) -> Tensor:
    """Give y the strides that the fake implementation promises; copy it only if it must be."""
    strides = channels_last_strides(*y.shape)
    if y.stride() == strides:
        return y
    # Extents of 1 leave several strides possible for the same memory; unify them. In place, since a
    # view could not be written to by what comes next (autograd forbids it for results of an op).
    y = y.contiguous(memory_format=channels_last_format(y))
    return y.as_strided_(y.shape, strides)


def _layout_in_python(tensors: tuple[Tensor | None, ...]) -> Hashable:
    return tuple(
        None
        if t is None
        else (t.shape, t.dtype, t.device, t.layout, t.layout == torch.strided and t.stride())
        for t in tensors
    )


#: Shape, strides, dtype, device and layout of tensors, as one key.
_layout_of: Callable[[tuple[Tensor | None, ...]], Hashable] = (
    _layout_in_python if _build.extension is None else _build.extension.layout_of
)


def choose_conv(
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
    pool: MaxPool | None = None,
) -> backends.Choice:
    """The kernel for a call of ``conv_affine_act`` (of the stem's op if there is a ``pool``).

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
        pool,
        backends.forced(),
        backends.generation(),
    )
    choice = _remembered.get(key)
    if choice is None:
        oh, ow = _check_conv(x, weight, scale, shift, stride, padding, dilation, groups)
        _check_epilogue(x, residual, (x.shape[0], weight.shape[0], oh, ow), epilogue)
        if pool is not None:
            _check_pool(pool, oh, ow)
        problem = ConvProblem(
            n=x.shape[0],
            c=x.shape[1],
            h=x.shape[2],
            w=x.shape[3],
            k=weight.shape[0],
            r=weight.shape[2],
            s=weight.shape[3],
            stride=_pair(stride),
            padding=_pair(padding),
            dilation=_pair(dilation),
            groups=groups,
            epilogue=epilogue,
            dtype=x.dtype,
            x_channels_last=x.is_contiguous(memory_format=torch.channels_last),
            pool=pool,
        )
        op = "conv_affine_act" if pool is None else "conv_affine_relu_maxpool"
        choice = _remember(key, backends.choose(op, problem, x.device))
    return choice


def run_conv(
    choice: backends.Choice,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """Run what `choose_conv` (or `conv3d_op.choose_conv3d`) chose for these very tensors."""
    if x.shape[0] == 0:
        assert isinstance(choice.problem, Convolution)
        shape = choice.problem.out_shape
        return x.new_empty_strided(shape, channels_last_strides(*shape))
    if residual is not None:
        residual = residual.contiguous(memory_format=channels_last_format(residual))
    # Kernels read the vectors as flat arrays.
    scale, shift = scale.contiguous(), shift.contiguous()
    return channels_last(backends.run(choice, x, weight, scale, shift, residual))


def _conv_affine_act(
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
    choice = choose_conv(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, epilogue
    )
    return run_conv(choice, x, weight, scale, shift, residual)


def _conv_affine_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel: Ints,
    pool_stride: Ints,
    pool_padding: Ints,
) -> Tensor:
    pool = MaxPool(_pair(pool_kernel), _pair(pool_stride), _pair(pool_padding))
    choice = choose_conv(
        x, weight, scale, shift, None, stride, padding, dilation, groups, "relu", pool
    )
    return run_conv(choice, x, weight, scale, shift, None)


def _add_choice(a: Tensor, b: Tensor, inplace: bool) -> backends.Choice:
    key = (
        _layout_of((a, b)),
        inplace,
        backends.forced(),
        backends.generation(),
    )
    choice = _remembered.get(key)
    if choice is None:
        check_add(a, b)
        alike = a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a)
        problem = AddReluProblem(tuple(a.shape), a.dtype, inplace, alike)
        choice = _remember(key, backends.choose("add_relu", problem, a.device))
    return choice


def _add_relu(a: Tensor, b: Tensor) -> Tensor:
    choice = _add_choice(a, b, False)
    if a.numel() == 0:
        return torch.empty_like(a)
    y: Tensor = backends.run(choice, a, b)
    # Operands that lie differently in memory: the result lies as a fresh copy of a would.
    return y if y.stride() == a.stride() else torch.empty_like(a).copy_(y)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a and b may overlap without being the same: writing a could change b unread."""
    return (
        a.layout == b.layout == torch.strided
        and a.device == b.device
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and (a.data_ptr() != b.data_ptr() or a.stride() != b.stride())
    )


def check_no_tangent(name: str, instead: str) -> None:
    """Raise RuntimeError under forward-mode differentiation, which would pass the op by unseen."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"fused_resnet::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, "
            f"torch.autograd.forward_ad); use {instead}"
        )


def _add_relu_(a: Tensor, b: Tensor) -> None:
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        raise RuntimeError(
            "fused_resnet::add_relu_ has no gradient, but a or b requires one; use add_relu, or "
            "fused_resnet.functional.add_relu(a, b, inplace=True)"
        )
    check_no_tangent("add_relu_", "fused_resnet.functional.add_relu(a, b, inplace=True)")
    if _share_memory(a, b):
        b = b.clone()
    choice = _add_choice(a, b, True)
    if a.numel() != 0:
        version = a._version if not a.is_inference() else None
        backends.run(choice, a, b)
        if version is not None and a._version == version:
            # A kernel that writes raw memory; autograd and caches must see the edit all the same.
            torch.autograd.graph.increment_version(a)


# --------------------------------------------------------------------------------------------------
# Fake implementations: shape, dtype and exact strides, without data.
# --------------------------------------------------------------------------------------------------


def _conv_affine_act_fake(
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
    """[N, K, OH, OW] of x's dtype, dense in channels_last order."""
    oh, ow = _check_conv(x, weight, scale, shift, stride, padding, dilation, groups)
    shape = (x.shape[0], weight.shape[0], oh, ow)
    _check_epilogue(x, residual, shape, epilogue)
    return x.new_empty_strided(shape, channels_last_strides(*shape))


def _conv_affine_relu_maxpool_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel: Ints,
    pool_stride: Ints,
    pool_padding: Ints,
) -> Tensor:
    """[N, K, PH, PW] of x's dtype, dense in channels_last order."""
    oh, ow = _check_conv(x, weight, scale, shift, stride, padding, dilation, groups)
    pool = MaxPool(_pair(pool_kernel), _pair(pool_stride), _pair(pool_padding))
    shape = (x.shape[0], weight.shape[0], *_check_pool(pool, oh, ow))
    return x.new_empty_strided(shape, channels_last_strides(*shape))


def _add_relu_fake(a: Tensor, b: Tensor) -> Tensor:
    """Of a's shape and dtype; a's strides if it is dense, else those of ``empty_like(a)``."""
    check_add(a, b)
    return torch.empty_like(a)


def _add_relu_inplace_fake(a: Tensor, b: Tensor) -> None:
    check_add(a, b)


# --------------------------------------------------------------------------------------------------
# Gradients: through stock ATen, from the values that the forward pass had anyway.
# --------------------------------------------------------------------------------------------------


#: Epilogues that end in a ReLU.
_CLIPPED = frozenset({"relu", "add_relu", "relu_add_relu"})


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, _, *ctx.geometry, ctx.epilogue = inputs
    # Only a ReLU's gradient looks at the result; else the next module may write into it.
    clipped = ctx.epilogue in _CLIPPED
    ctx.save_for_backward(x, weight, scale, shift, output if clipped else None)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, shift, output = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    want_x, want_weight, want_scale, want_shift, want_residual = ctx.needs_input_grad[:5]
    conv: Callable[..., Tensor] = torch.conv3d if x.dim() == 5 else torch.conv2d
    pixels = (0, *range(2, x.dim()))

    def convolution() -> Tensor:
        return conv(x, weight, None, stride, padding, dilation, groups)

    if ctx.epilogue in _CLIPPED:
        grad = grad * (output > 0)
    grad_residual = grad if want_residual else None
    y = None
    if ctx.epilogue == "relu_add_relu":
        # The inner ReLU's sign is not in the output, so its argument is computed again.
        y = convolution()
        z = y.to(scale.dtype) * per_channel(scale, y) + per_channel(shift, y)
        grad = grad * (z > 0)
    grad_x = grad_weight = grad_scale = grad_shift = None
    if want_x or want_weight:
        grad_y = (grad * per_channel(scale, grad)).to(x.dtype)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_y,
            x,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [want_x, want_weight, False],
        )
    if want_shift:
        grad_shift = grad.sum(pixels, dtype=shift.dtype)
    if want_scale:
        y = convolution() if y is None else y
        grad_scale = (grad.to(scale.dtype) * y.to(scale.dtype)).sum(pixels)
    return grad_x, grad_weight, grad_scale, grad_shift, grad_residual, *(None,) * 5


def _stem_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, *ctx.parameters = inputs
    ctx.save_for_backward(x, weight, scale, shift)


def _stem_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The activation before the pooling was never stored: compute it again, differentiably.
    tensors = ctx.saved_tensors
    *geometry, pool_kernel, pool_stride, pool_padding = ctx.parameters
    wanted = ctx.needs_input_grad[:4]
    with torch.enable_grad():
        leaves = [
            t if torch.is_grad_enabled() and t.requires_grad else t.detach().requires_grad_(w)
            for t, w in zip(tensors, wanted, strict=True)
        ]
        y = torch.ops.fused_resnet.conv_affine_act(*leaves, None, *geometry, "relu")
        y = torch.max_pool2d(y, pool_kernel, pool_stride, pool_padding)
    chosen = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
    grads = iter(torch.autograd.grad(y, chosen, grad, create_graph=torch.is_grad_enabled()))
    return *(next(grads) if w else None for w in wanted), *(None,) * 7


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (output,) = ctx.saved_tensors
    grad = grad * (output > 0)
    return grad, grad


def _register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """As ``torch.library.register_autograd``, with forward mode and torch.func as well.

    There the ATen calls that the op stands for are differentiated: torch's own kernel would drop
    tangents in silence, and refuses torch.func.grad.
    """
    op = getattr(torch.ops.fused_resnet, name).default
    reverse = library_autograd.make_autograd_impl(op, library_autograd.Info(backward, setup))

    def differentiate(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            from fused_resnet.decompositions import decompositions

            return decompositions()[op](*args)
        return reverse(keyset, *args)

    _LIB.impl(name, differentiate, "Autograd", with_keyset=True)


# --------------------------------------------------------------------------------------------------
# Autocast: activations and weights take the autocast dtype, scale and shift stay fp32.
# --------------------------------------------------------------------------------------------------


def _autocast_keys(device: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKey
    return torch._C.DispatchKeySet(keys.AutocastCPU if device == "cpu" else keys.AutocastCUDA)


def _autocast(op: Callable[..., Any], device: str, kept: tuple[int, ...]) -> Callable[..., Any]:
    """The autocast rule of ``op``: cast every tensor but those at the positions ``kept``."""
    excluded = _autocast_keys(device)

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [
            _autocast_cast(a, torch.float32 if i in kept else dtype, device)
            for i, a in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast)

    return rule


def _autocast_cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    """``value`` in ``dtype`` if it is a tensor that autocast casts: floating, but not float64."""
    if (
        not isinstance(value, Tensor)
        or value.dtype == dtype
        or value.dtype == torch.float64
        or value.device.type != device
        or not value.is_floating_point()
    ):
        return value
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not persistent(value):
        return value.to(dtype)
    # A weight: kept, so that kernels know it again and pack it once.
    kept = _casts.get(value)
    if kept is None or kept[1].dtype != dtype or not kept[0].holds((value,)):
        with torch.inference_mode(False):
            kept = Snapshot((value,)), keep(value.detach().to(dtype))
        _casts[value] = kept
    return kept[1]


#: Weights in the dtype of autocast, as long as they live and are not changed.
_casts: MutableMapping[Tensor, tuple[Snapshot, Tensor]] = WeakTensorKeyDictionary()


def _autocast_add(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The autocast rule of ``add_relu``: as stock ``a + b``, in the wider of the two dtypes."""
    excluded = _autocast_keys(device)

    def rule(a: Tensor, b: Tensor) -> Any:
        if a.is_floating_point() and b.is_floating_point():
            wider = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(wider), b.to(wider)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(a, b)

    return rule


# --------------------------------------------------------------------------------------------------
# vmap: a further batch dimension joins N; batched weights (an ensemble) are taken one by one.
# --------------------------------------------------------------------------------------------------


def _vmap_conv(op: Callable[..., Any], activations: tuple[int, ...]) -> Callable[..., Any]:
    """The vmap rule of a convolution whose arguments at the positions ``activations`` have an N."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        size: int = info.batch_size
        # Lists of integers have a list of None for their dimension.
        dims = [d if isinstance(d, int) else None for d in in_dims]
        if any(d is not None for i, d in enumerate(dims) if i not in activations):
            each = [
                op(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
                for i in range(size)
            ]
            return torch.stack(each), 0
        joined = list(args)
        for i in activations:
            if args[i] is not None:
                d = dims[i]
                t = args[i].expand(size, *args[i].shape) if d is None else args[i].movedim(d, 0)
                joined[i] = t.flatten(0, 1)
        y: Tensor = op(*joined)
        return y.unflatten(0, (size, y.shape[0] // size)), 0

    return rule


def _vmap_add(info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor) -> Any:
    a, b = (
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((a, b), in_dims, strict=True)
    )
    return torch.ops.fused_resnet.add_relu(a, b), 0


def _register() -> None:
    ops = torch.ops.fused_resnet
    for name, real, fake, kept in (
        ("conv_affine_act", _conv_affine_act, _conv_affine_act_fake, (2, 3)),
        (
            "conv_affine_relu_maxpool",
            _conv_affine_relu_maxpool,
            _conv_affine_relu_maxpool_fake,
            (2, 3),
        ),
        ("add_relu", _add_relu, _add_relu_fake, None),
        ("add_relu_", _add_relu_, _add_relu_inplace_fake, None),
    ):
        _LIB.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_resnet::{name}", fake, lib=_LIB)
        if kept is not None:
            op = getattr(ops, name).default
            _LIB.impl(name, _autocast(op, "cpu", kept), "AutocastCPU")
            _LIB.impl(name, _autocast(op, "cuda", kept), "AutocastCUDA")
    # The in-place op has no rule: it must not change the dtype of what it writes to.
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIB.impl("add_relu", _autocast_add(ops.add_relu.default, device), key)
    for name, backward, setup in (
        ("conv_affine_act", _conv_backward, _conv_setup),
        ("conv_affine_relu_maxpool", _stem_backward, _stem_setup),
        ("add_relu", _add_backward, _add_setup),
    ):
        _register_autograd(name, backward, setup)
    for name, rule in (
        ("conv_affine_act", _vmap_conv(ops.conv_affine_act.default, (0, 4))),
        ("conv_affine_relu_maxpool", _vmap_conv(ops.conv_affine_relu_maxpool.default, (0,))),
        ("add_relu", _vmap_add),
    ):
        torch.library.register_vmap(f"fused_resnet::{name}", rule, lib=_LIB)


_register()
