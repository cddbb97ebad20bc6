"""Problems drawn at random, their float64 answers, and the rule by which results are judged."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import backends
from fused_resnet.numerics import error
from fused_resnet.problem import (
    RESIDUAL_EPILOGUES,
    Conv3dProblem,
    Convolution,
    ConvProblem,
    MaxPool,
    channels_last_format,
)

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def short(value: Any) -> str:
    """A test id."""
    return str(value).removeprefix("torch.").replace(" ", "_")


def conv_problem(
    n: int = 2,
    c: int = 8,
    h: int = 9,
    w: int = 7,
    k: int = 12,
    r: int = 3,
    s: int | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    epilogue: str = "relu",
    dtype: torch.dtype = torch.float32,
    x_channels_last: bool = True,
    pool: MaxPool | None = None,
) -> ConvProblem:
    s = r if s is None else s
    return ConvProblem(
        n, c, h, w, k, r, s, stride, padding, dilation, groups, epilogue, dtype,
        x_channels_last, pool,
    )  # fmt: skip


def conv3d_problem(
    n: int = 2,
    c: int = 8,
    size: tuple[int, int, int] = (4, 9, 7),
    k: int = 12,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (1, 1, 1),
    dilation: tuple[int, int, int] = (1, 1, 1),
    groups: int = 1,
    epilogue: str = "relu",
    dtype: torch.dtype = torch.float32,
) -> Conv3dProblem:
    return Conv3dProblem(n, c, size, k, kernel, stride, padding, dilation, groups, epilogue, dtype)


#: Shapes that kernels get wrong: odd extents, asymmetric windows, groups, dilation, single pixels.
GEOMETRIES = {
    "1x1": {"r": 1, "padding": (0, 0)},
    "1x1_stride_2": {"r": 1, "stride": (2, 2), "padding": (0, 0)},
    "3x3": {},
    "3x3_stride_2_wide": {"c": 32, "k": 64, "stride": (2, 2), "h": 14, "w": 14},
    "asymmetric": {"r": 5, "s": 3, "stride": (1, 2), "padding": (2, 0)},
    "asymmetric_dilation": {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 3)},
    "dilation": {"padding": (2, 2), "dilation": (2, 2)},
    "depthwise": {"c": 16, "k": 16, "groups": 16},
    "depthwise_multiplier": {"c": 6, "k": 12, "groups": 6},
    "groups": {"c": 12, "k": 8, "groups": 4},
    "one_input_channel": {"c": 1, "k": 3},
    "one_output_channel": {"c": 5, "k": 1},
    "one_pixel": {"h": 1, "w": 1},
    "one_pixel_1x1": {"h": 1, "w": 1, "r": 1, "padding": (0, 0)},
    "kernel_covers_all": {"n": 1, "h": 4, "w": 5, "r": 4, "s": 5, "padding": (0, 0)},
    "even_kernel": {"n": 1, "r": 2, "padding": (1, 1), "c": 3, "k": 5},
    "padding_beyond_kernel": {"padding": (4, 3)},
    "stem_7x7": {"n": 1, "c": 3, "h": 17, "w": 21, "k": 16, "r": 7, "stride": (2, 2),
                 "padding": (3, 3)},
    "wide_row": {"n": 1, "h": 1, "w": 33, "r": 1, "s": 3, "padding": (0, 1)},
}  # fmt: skip


class Args(NamedTuple):
    """Tensors of a ``conv_affine_act`` or ``conv3d_affine_act`` problem."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=channels_last_format(t))


def draw(p: Convolution, seed: int = 0) -> Args:
    """Random tensors of the problem's shapes; scales have both signs, some are zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    vectors = torch.float64 if p.dtype == torch.float64 else torch.float32
    fan_in = math.prod(p.weight_shape[1:])
    scale = normal(p.k) * 1.5
    scale[:: max(p.k // 3, 2)] = 0.0
    weight = normal(*p.weight_shape) / fan_in**0.5
    residual = normal(*p.out_shape) if p.epilogue in RESIDUAL_EPILOGUES else None
    return Args(
        channels_last(normal(*p.in_shape).to(p.dtype)),
        weight.to(p.dtype),
        scale.to(vectors),
        normal(p.k).to(vectors),
        None if residual is None else channels_last(residual.to(p.dtype)),
    )


def stock(p: Convolution, args: Args, dtype: torch.dtype | None = None) -> Tensor:
    """The problem by stock torch modules: in its own dtype, or in ``dtype``."""
    x, weight, scale, shift, residual = (
        None if t is None or dtype is None else t.to(dtype) for t in args
    ) if dtype is not None else args  # fmt: skip
    conv = nn.functional.conv3d if x.dim() == 5 else nn.functional.conv2d
    y = conv(x, weight, None, p.stride, p.padding, p.dilation, p.groups)
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    z = nn.functional.batch_norm(y, mean, var, scale, shift, training=False, eps=0.0)
    if p.epilogue == "relu":
        z = z.relu()
    elif p.epilogue == "add":
        z = z + residual
    elif p.epilogue == "add_relu":
        z = (z + residual).relu()
    elif p.epilogue == "relu_add_relu":
        z = (z.relu() + residual).relu()
    if p.pool is not None:
        z = nn.functional.max_pool2d(z, p.pool.kernel, p.pool.stride, p.pool.padding)
    return z


def reference(p: Convolution, args: Args) -> Tensor:
    """The problem in float64."""
    return stock(p, args, torch.float64)


def call(p: Convolution, args: Args) -> Tensor:
    """The registered op on these tensors."""
    if p.pool is not None:
        return torch.ops.fused_resnet.conv_affine_relu_maxpool(
            *args[:4], p.stride, p.padding, p.dilation, p.groups,
            p.pool.kernel, p.pool.stride, p.pool.padding,
        )  # fmt: skip
    ops = torch.ops.fused_resnet
    op = ops.conv3d_affine_act if isinstance(p, Conv3dProblem) else ops.conv_affine_act
    return op(*args, p.stride, p.padding, p.dilation, p.groups, p.epilogue)


def assert_within_rule(
    actual: Tensor, reference: Tensor, stock: Tensor, dtype: torch.dtype
) -> None:
    """Error against float64 at most twice stock's in that dtype, plus a rounding unit."""
    assert actual.dtype == dtype
    assert actual.shape == reference.shape
    found, allowed = error(actual, reference), error(stock, reference)
    assert found.within(allowed, dtype), f"{found!r} where stock has {allowed!r}"


def conv_kernels(op: str = "conv_affine_act") -> list[backends.Kernel]:
    """Every kernel of ``op`` that may run on the CPU."""
    problem: Convolution = conv_problem(n=1, h=4, w=4)
    if op == "conv3d_affine_act":
        problem = conv3d_problem()
    if op == "conv_affine_relu_maxpool":
        problem = conv_problem(pool=MaxPool((3, 3), (2, 2), (1, 1)))
    return [k for k in backends.KERNELS if k.op == op and k.supports(problem, CPU) is None]


def randomise(model: nn.Module) -> nn.Module:
    """Norms as after training: no statistic, weight or bias is trivial."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(getattr(m, "running_var", None), Tensor):
                m.running_mean.normal_(0.0, 0.5)
                m.running_var.uniform_(0.25, 4.0)
                if m.weight is not None:
                    m.weight.normal_(1.0, 0.5)
                    m.bias.normal_(0.0, 0.5)
    return model
