"""Single fused ops beside stock torch's calls for the same, timed by pytest-benchmark.

    pytest benchmarks/test_ops.py --benchmark-group-by=param:name,param:dtype

One op after another is timed, so compare each with its own past (``--benchmark-autosave``,
``--benchmark-compare``); the page of ``fused-resnet bench --report`` has every op of a network, in
turns with stock torch.
"""

import pytest
import torch

from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import ConvProblem, MaxPool
from fused_resnet.rooflines import stock_call

#: Ops of ResNet-50 at batch 4, by the stage they come from:
#: (C, H, K, R, stride, epilogue, pool), square, padded to keep the size.
OPS = {
    "stem": (3, 224, 64, 7, 2, "relu", MaxPool((3, 3), (2, 2), (1, 1))),
    "conv2 1x1": (256, 56, 64, 1, 1, "relu", None),
    "conv2 3x3": (64, 56, 64, 3, 1, "relu", None),
    "conv2 1x1 add": (64, 56, 256, 1, 1, "add_relu", None),
    "conv3 3x3 stride 2": (128, 56, 128, 3, 2, "relu", None),
    "conv3 projection": (256, 56, 512, 1, 2, "none", None),
    "conv4 3x3": (256, 14, 256, 3, 1, "relu", None),
    "conv5 1x1 add": (512, 7, 2048, 1, 1, "add_relu", None),
}


def _problem(name, dtype):
    c, h, k, r, stride, epilogue, pool = OPS[name]
    pair, pad = (stride, stride), (r // 2, r // 2)
    return ConvProblem(4, c, h, h, k, r, r, pair, pad, (1, 1), 1, epilogue, dtype, pool=pool)


def _operands(p):
    """[x, weight, scale, shift], and the residual where the epilogue adds one."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    weight = normal(p.k, p.c, p.r, p.s) / (p.c * p.r * p.s) ** 0.5
    operands = [normal(p.n, p.c, p.h, p.w).to(p.dtype), weight.to(p.dtype)]
    operands += [torch.rand(p.k, generator=g) + 0.5, normal(p.k)]
    operands += [normal(*p.out_shape).to(p.dtype)] if p.has_residual else []
    last = torch.channels_last
    return [t.contiguous(memory_format=last) if t.dim() == 4 else t for t in operands]


def _fused(p, x, weight, scale, shift, residual=None):
    weight = torch.nn.Parameter(weight, requires_grad=False)  # Packed once, as a model's is.
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    if p.pool is not None:
        pool = (p.pool.kernel, p.pool.stride, p.pool.padding)
        op = torch.ops.fused_resnet.conv_affine_relu_maxpool
        return lambda: op(x, weight, scale, shift, *geometry, *pool)
    op = torch.ops.fused_resnet.conv_affine_act
    return lambda: op(x, weight, scale, shift, residual, *geometry, p.epilogue)


@pytest.mark.parametrize("who", ["stock", "fused"])
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark, name, who, dtype):
    problem = _problem(name, dtype)
    operands = _operands(problem)
    with torch.inference_mode():
        run = stock_call(problem, operands) if who == "stock" else _fused(problem, *operands)
        args = (problem, *operands, *([] if problem.has_residual else [None]))
        exact = reference_conv(*args)
        assert error(run(), exact).within(error(stock_conv(*args), exact), dtype)
        benchmark.extra_info.update(flops=problem.flops, min_bytes=problem.min_bytes)
        benchmark(run)
