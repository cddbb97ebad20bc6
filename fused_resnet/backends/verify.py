"""A kernel's entrance test: small problems against float64, once per process, device and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_resnet.backends.kernel import Kernel
from fused_resnet.numerics import error, fault, reference_conv, stock_conv
from fused_resnet.problem import (
    EPILOGUES,
    RESIDUAL_EPILOGUES,
    AddReluProblem,
    ConvProblem,
    MaxPool,
    Problem,
)


def verify(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run ``kernel`` on the fixed small problems that it supports; None if all come out right.

    Returns:
        None, or a sentence that says which problem went wrong and how.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for problem in _problems(kernel.op, dtype):
            if kernel.supports(problem, device) is not None:
                continue
            # Transforms of inexact kernels spread what is not finite; they say how far.
            for infinite in (False, True) if kernel.exact else (False,):
                try:
                    reason = _check(kernel, problem, device, infinite)
                except Exception as e:
                    if is_out_of_memory(e):
                        raise
                    return f"on {problem} it raised {type(e).__name__}: {e}"
                if reason is not None:
                    return reason + (" (with NaN and infinities in its input)" if infinite else "")
    return None


def is_out_of_memory(e: Exception) -> bool:
    """Whether memory ran out, which says nothing about the kernel that was running."""
    # The CPU allocator raises a plain RuntimeError that names it.
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(e)


def _problems(op: str, dtype: torch.dtype) -> Iterator[Problem]:
    if op == "add_relu":
        for inplace in (False, True):
            yield AddReluProblem((2, 16, 5, 7), dtype, inplace, True)
    elif op == "conv_affine_relu_maxpool":
        pool = MaxPool((3, 3), (2, 2), (1, 1))
        yield ConvProblem(
            2, 3, 19, 23, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", dtype, True, pool
        )
    else:
        geometries = (  # c, k, kernel, stride, padding, groups
            (32, 48, 1, 1, 0, 1),
            (32, 48, 3, 2, 1, 1),
            (16, 16, 3, 1, 1, 4),
        )
        for (c, k, r, stride, pad, groups), epilogue in itertools.product(geometries, EPILOGUES):
            yield ConvProblem(
                2,
                c,
                9,
                7,
                k,
                r,
                r,
                (stride, stride),
                (pad, pad),
                (1, 1),
                groups,
                epilogue,
                dtype,
            )


def _check(kernel: Kernel, problem: Problem, device: torch.device, infinite: bool) -> str | None:
    # Drawn on the CPU from a generator of its own: the same everywhere, and no user's seed moves.
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        # Device and dtype are said, since the user may have changed the defaults.
        drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return drawn.to(device, dtype)

    def image(shape: tuple[int, ...]) -> Tensor:
        drawn = draw(*shape).contiguous(memory_format=torch.channels_last)
        if infinite:
            drawn[0, 0, 0, 0] = float("nan")
            drawn[-1, -1, -1, -1] = float("inf")
            drawn[0, -1, 2, 3] = float("-inf")
        return drawn

    if isinstance(problem, AddReluProblem):
        a, b = image(problem.shape), image(problem.shape)
        reference, stock = torch.relu(a.double() + b.double()), torch.relu(a + b)
        result = kernel.run(problem, a, b)
    else:
        p = problem
        vectors = torch.float64 if p.dtype == torch.float64 else torch.float32
        fan_in = p.c // p.groups * p.r * p.s
        args = (
            image((p.n, p.c, p.h, p.w)),
            draw(p.k, p.c // p.groups, p.r, p.s) / fan_in**0.5,
            draw(p.k, dtype=vectors) + 1.0,
            draw(p.k, dtype=vectors),
            image(p.out_shape) if p.epilogue in RESIDUAL_EPILOGUES else None,
        )
        reference, stock = reference_conv(p, *args), stock_conv(p, *args)
        result = kernel.run(p, *args)
    if result.shape != reference.shape or result.dtype != problem.dtype:
        return f"on {problem} it returned {tuple(result.shape)} {result.dtype}"
    found, allowed = error(result, reference), error(stock, reference)
    wrong = fault(found, allowed, problem.dtype, kernel.exact)
    return None if wrong is None else f"on {problem} {wrong}"
