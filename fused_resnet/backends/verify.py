"""A kernel's entrance test: small problems against float64, once per process, device and dtype."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_resnet.backends.kernel import Kernel
from fused_resnet.numerics import (
    error,
    fault,
    reference_chain,
    reference_conv,
    stock_chain,
    stock_conv,
)
from fused_resnet.problem import (
    EPILOGUES,
    RESIDUAL_EPILOGUES,
    AddReluProblem,
    ChainProblem,
    Conv3dProblem,
    ConvProblem,
    MaxPool,
    Problem,
    channels_last_format,
)
from fused_resnet.stock import Compute, errors_of, marked


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
    elif op == "bottleneck_chain":
        for m, following, proj, stride, store in (
            (64, 64, 0, 1, "all"),
            (64, 64, 64, 1, "even"),
            (128, 256, 0, 1, "all"),
            (128, 128, 256, 2, "all"),
            (256, 0, 0, 1, "pool"),
        ):
            yield ChainProblem(
                2, m, 9, 7, 4 * m, following, proj, stride, stride if proj else 1, store, dtype
            )
    elif op == "conv_affine_relu_maxpool":
        pool = MaxPool((3, 3), (2, 2), (1, 1))
        yield ConvProblem(
            2, 3, 19, 23, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", dtype, True, pool
        )
    elif op == "conv3d_affine_act":
        videos = (  # c, k, kernel, stride, padding, groups
            (8, 24, (3, 3, 3), (1, 1, 1), (1, 1, 1), 1),
            (8, 24, (1, 3, 3), (1, 2, 2), (0, 1, 1), 1),
            (16, 16, (3, 1, 1), (2, 1, 1), (1, 0, 0), 4),
        )
        for (c, k, kernel, step, zeros, groups), epilogue in itertools.product(videos, EPILOGUES):
            yield Conv3dProblem(
                2, c, (4, 9, 7), k, kernel, step, zeros, (1, 1, 1), groups, epilogue, dtype
            )
    else:
        geometries = (  # c, k, kernel, stride, padding, groups
            (32, 48, 1, 1, 0, 1),
            (32, 48, 3, 1, 1, 1),
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
        drawn = draw(*shape)
        drawn = drawn.contiguous(memory_format=channels_last_format(drawn))
        if infinite:
            drawn[(0,) * drawn.dim()] = float("nan")
            drawn[(-1,) * drawn.dim()] = float("inf")
            drawn[0, -1, ..., 2, 3] = float("-inf")
        return drawn

    def conv(k: int, c: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
        weight = draw(k, c, r, r) / (c * r * r) ** 0.5
        return weight, draw(k, dtype=vectors) + 1.0, draw(k, dtype=vectors)

    p = problem
    vectors = torch.float64 if p.dtype == torch.float64 else torch.float32
    args: tuple[Tensor | None, ...]
    compute: Compute
    # Each as a tuple of results.
    reference: tuple[Tensor, ...]
    stock: tuple[Tensor, ...]
    if isinstance(p, AddReluProblem):
        args = a, b = image(p.shape), image(p.shape)
        reference, stock = (torch.relu(a.double() + b.double()),), (torch.relu(a + b),)
        compute = lambda _conv, _chain: stock  # noqa: E731
    elif isinstance(p, ChainProblem):
        args = (
            image((p.n, p.m, p.h, p.w)),
            image((p.n, p.proj, p.h, p.w) if p.step > 1 else p.residual_shape),
            *conv(p.m, p.m, 3),
            *conv(p.k, p.m, 1),
            *(conv(p.k, p.proj, 1) if p.proj else (None,) * 3),
            *(conv(p.next, p.k, 1) if p.next else (None,) * 3),
        )
        compute = lambda _conv, chain: chain(p, *args)  # noqa: E731
        reference, stock = reference_chain(p, *args), stock_chain(p, *args)
    else:
        operands = (
            image(p.in_shape),
            draw(*p.weight_shape) / math.prod(p.weight_shape[1:]) ** 0.5,
            draw(p.k, dtype=vectors) + 1.0,
            draw(p.k, dtype=vectors),
        )
        residual = image(p.out_shape) if p.epilogue in RESIDUAL_EPILOGUES else None
        args = *operands, residual
        compute = lambda conv, _chain: (conv(p, *args),)  # noqa: E731
        reference, stock = (
            compute(reference_conv, reference_chain),
            compute(stock_conv, stock_chain),
        )
    result = kernel.run(p, *args)
    results = (result,) if isinstance(result, Tensor) else result
    allowed = marked(errors_of(stock, reference), p, reference, compute)
    for actual, right, usual in zip(results, reference, allowed, strict=True):
        if actual.shape != right.shape or actual.dtype != p.dtype:
            return f"on {p} it returned {tuple(actual.shape)} {actual.dtype}"
        if infinite and not kernel.exact:
            # Its tiles spread what is not finite; none of it may get lost.
            if bool((actual.isfinite() & ~right.isfinite()).any()):
                return f"on {p} it makes finite what is not"
            continue
        wrong = fault(error(actual, right), usual, p.dtype, kernel.exact)
        if wrong is not None:
            return f"on {p} {wrong}"
    return None
