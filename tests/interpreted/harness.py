"""What the interpreter tests share: problems, data, and the rule against float64."""

import dataclasses

import torch
from torch import Tensor

from fused_resnet.backends.triton_.config import ARCHS
from fused_resnet.backends.triton_.kernels import TritonConv
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import ConvProblem, channels_last_strides

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# One GPU of each family of tensor instructions; each has tiles and a way of loading of its own.
A100, H100, B200 = ARCHS[0], ARCHS[3], ARCHS[4]
FAMILIES = {arch.family: arch for arch in (A100, H100, B200)}
# With one SM the heuristic takes the largest tile that fits and splits nothing: in the interpreter
# it is the number of programs and of steps that takes time.
CONV = {family: TritonConv(dataclasses.replace(arch, sms=1)) for family, arch in FAMILIES.items()}


def conv_problem(
    c: int = 64,
    k: int = 64,
    r: int = 1,
    *,
    s: int | None = None,
    n: int = 2,
    h: int = 7,
    w: int = 9,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    epilogue: str = "relu",
    dtype: torch.dtype = torch.float16,
    **more: object,
) -> ConvProblem:
    """A problem of few words; padding keeps the size unless given."""
    s = r if s is None else s

    def pair(v: int | tuple[int, int]) -> tuple[int, int]:
        return (v, v) if isinstance(v, int) else v

    dilation = pair(dilation)
    if padding is None:
        padding = (r - 1) * dilation[0] // 2, (s - 1) * dilation[1] // 2
    return ConvProblem(
        n, c, h, w, k, r, s, pair(stride), pair(padding), dilation, groups, epilogue, dtype, **more
    )


def conv_data(
    problem: ConvProblem, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight, scale, shift and residual for a problem."""
    p = problem
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image(*shape: int) -> Tensor:
        return draw(*shape).to(p.dtype).contiguous(memory_format=torch.channels_last)

    x = image(p.n, p.c, p.h, p.w)
    weight = draw(p.k, p.c // p.groups, p.r, p.s) / (p.c // p.groups * p.r * p.s) ** 0.5
    scale, shift = draw(p.k) * 0.3 + 1, draw(p.k)
    residual = image(*p.out_shape) if p.has_residual else None
    return x, weight.to(p.dtype), scale, shift, residual


def assert_right(result: Tensor, problem: ConvProblem, data: tuple[Tensor | None, ...]) -> None:
    """Shape, dtype, strides, and the error rule against float64."""
    assert result.dtype == problem.dtype
    assert tuple(result.shape) == problem.out_shape
    assert result.stride() == channels_last_strides(*problem.out_shape)
    reference = reference_conv(problem, *data)
    found = error(result, reference)
    stock = error(stock_conv(problem, *data), reference)
    assert found.within(stock, problem.dtype), f"{problem}: error {found}, stock torch's {stock}"


def check(kernel, problem: ConvProblem, seed: int = 0) -> None:
    """Run a kernel on a problem and hold it to the rule."""
    assert kernel.supports(problem, torch.device("cpu")) is None
    data = conv_data(problem, seed)
    assert_right(kernel.run(problem, *data), problem, data)
