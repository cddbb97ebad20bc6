"""The one rule by which results are judged right, and the float64 reference they are judged by.

The rule: a result may be at most twice as far from a float64 reference as stock torch is in the
same dtype, plus the rounding unit of that dtype. Distance is relative to the reference, once by
its Euclidean norm (so that no noise hides in many elements) and once by its largest element (so
that no single wrong element hides among many right ones; a single element may be some fp32 units
farther off, as the order of a long sum decides).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.problem import ChainProblem, Convolution

#: What the order of an fp32 sum may do to a single element, relative to the largest: sums of some
#: thousand products differ by this much between kernels, stock torch's own for one batch size and
#: for another among them (1e-6 against 4e-7 for 1x1 convolutions of 1024 channels). A wrong
#: element is off by orders of magnitude more.
_ORDER_OF_SUMMATION = 8 * torch.finfo(torch.float32).eps


#: Elements, of whole images, that are looked at in float64 at once: copies take memory.
_PIECE = 2**20


@dataclass(frozen=True)
class Error:
    """Distance of a result from its float64 reference, relative to the reference.

    Attributes:
        l2: norm of the difference over norm of the reference.
        worst: largest absolute difference over largest absolute reference value.
        finite: whether infinities and NaNs stand where the reference has them.
        rounding: set where this is stock torch's error and stock torch is wrong: the error that
            rounding explains (see `fused_resnet.stock`).
    """

    l2: float
    worst: float
    finite: bool = True
    rounding: Error | None = None

    def within(self, stock: Error, dtype: torch.dtype) -> bool:
        """Whether this error is acceptable where stock torch has the error ``stock``.

        Where stock torch is wrong, twice its error means nothing: what rounding explains counts.
        """
        # A float64 result is as exact as its reference: both may be off by some rounding units.
        unit = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
        limit = stock.rounding or Error(2 * stock.l2, 2 * stock.worst, stock.finite)
        return (
            (self.finite or not limit.finite)
            and self.l2 <= limit.l2 + unit
            and self.worst <= limit.worst + unit + _ORDER_OF_SUMMATION
        )

    def __str__(self) -> str:
        text = f"{self.l2:.2e}" + ("" if self.finite else " (non-finite values differ)")
        if self.rounding is None:
            return text
        return f"{text}, so it is wrong itself: rounding explains {self.rounding.l2:.1e}"


#: Error by norm up to which an inexact kernel (see ``Kernel.exact``) of each dtype may be used
#: unless the user says otherwise. A layer by Winograd's F(4x4, 3x3) in fp32 is off by 6e-7 to 1e-6,
#: one by F(2x2, 3x3) in bf16 by 4e-3, where plain sums are off by 1.5e-7 and 3e-3.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}

#: An inexact kernel that is off by more than so many times `TOLERANCE` is broken.
_BROKEN = 16.0


def fault(found: Error, stock: Error, dtype: torch.dtype, exact: bool) -> str | None:
    """None if a kernel's result may be right, else what is wrong with it.

    An exact kernel must satisfy the rule. An inexact one may also be off by some times `TOLERANCE`;
    whether it is then used is for its user's tolerance to say.
    """
    if found.within(stock, dtype):
        return None
    if not exact and found.finite and dtype in TOLERANCE:
        limit = _BROKEN * TOLERANCE[dtype]
        if found.l2 <= limit and found.worst <= limit:
            return None
    return f"its error is {found}, stock torch's is {stock}"


def largest(*errors: Error) -> Error:
    """The larger error in each respect, for a stock result that can be had in several ways.

    Stock torch is as right in one memory format as in another, and over a whole network its error
    differs between them by up to two: the rule compares with whichever is farther off.
    """
    wrong = [e.rounding for e in errors if e.rounding is not None]
    return Error(
        max(e.l2 for e in errors),
        max(e.worst for e in errors),
        all(e.finite for e in errors),
        largest(*wrong) if wrong else None,
    )


def error(actual: Tensor, reference: Tensor) -> Error:
    """How far ``actual`` is from ``reference``, in float64.

    Args:
        actual: the result to judge, any floating dtype.
        reference: what it should be, of the same shape; float64 is expected.

    Raises:
        ValueError: if the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(
            f"cannot compare shapes {tuple(actual.shape)} and {tuple(reference.shape)}"
        )
    if reference.numel() == 0:
        return Error(0.0, 0.0)
    off = size = worst = most = 0.0
    finite = True
    rows = max(1, _PIECE * len(torch.atleast_1d(reference)) // reference.numel())
    pieces = (torch.atleast_1d(t.detach()).split(rows) for t in (actual, reference))
    for a, r in zip(*pieces, strict=True):
        a, r = a.double(), r.double()
        ok = r.isfinite()
        # Each NaN where the reference has one, each infinity with its sign.
        odd = ~ok | ~a.isfinite()
        same = torch.allclose(a[odd], r[odd], rtol=0.0, atol=0.0, equal_nan=True)
        both = ok & a.isfinite()
        a, r = torch.where(both, a, 0.0), torch.where(both, r, 0.0)
        diff = (a - r).abs()
        off, worst = math.hypot(off, diff.norm().item()), max(worst, diff.max().item())
        size, most = math.hypot(size, r.norm().item()), max(most, r.abs().max().item())
        finite = finite and same
    return Error(_ratio(off, size), _ratio(worst, most), finite)


def _ratio(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 else float("inf")


def apply_epilogue(z: Tensor, residual: Tensor | None, epilogue: str) -> Tensor:
    """The epilogue as plain torch operations, out of place and in the dtype of ``z``."""
    if epilogue.startswith("relu"):
        z = torch.relu(z)
    if residual is not None:
        z = z + residual
    if epilogue in ("add_relu", "relu_add_relu"):
        z = torch.relu(z)
    return z


def convolve(problem: Convolution, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution alone, by stock torch."""
    conv: Callable[..., Tensor] = torch.conv3d if x.dim() == 5 else torch.conv2d
    return conv(x, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector [K] as it multiplies and adds to ``like`` [N, K, ...]."""
    return vector.view(1, -1, *(1,) * (like.dim() - 2))


def reference_conv(
    problem: Convolution,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """The op ``conv_affine_act`` (or the stem, where ``problem.pool`` is set) in float64.

    Of a video ``conv3d_affine_act``; so in `stock_conv`.
    """
    z = convolve(problem, x.double(), weight.double())
    z = z * per_channel(scale.double(), z) + per_channel(shift.double(), z)
    z = apply_epilogue(z, None if residual is None else residual.double(), problem.epilogue)
    if problem.pool is not None:
        pool = problem.pool
        z = torch.max_pool2d(z, pool.kernel, pool.stride, pool.padding)
    return z


def stock_conv(
    problem: Convolution,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """The same op as stock torch computes it: convolution, batch norm, add, ReLU, each rounding."""
    return round_behind_conv(problem, convolve(problem, x, weight), scale, shift, residual)


def round_behind_conv(
    problem: Convolution, y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
) -> Tensor:
    """What stock torch does behind a convolution, in the dtype of ``y``: each step rounds."""
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    z = torch.batch_norm(y, scale, shift, mean, var, False, 0.0, 0.0, False)
    z = apply_epilogue(z, residual, problem.epilogue)
    if problem.pool is not None:
        pool = problem.pool
        z = torch.max_pool2d(z, pool.kernel, pool.stride, pool.padding)
    return z


def compose_chain(
    problem: ChainProblem, args: tuple[Any, ...], conv: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The op ``bottleneck_chain`` as one fused convolution after another.

    Args:
        problem: what is computed.
        args: the op's tensors, in its order.
        conv: computes a `ConvProblem` from x, weight, scale, shift and residual.

    Returns:
        ``out`` and ``mid_next``; the latter without elements where there is no next block.
    """
    mid, residual, w2, scale2, shift2, w3, scale3, shift3, *rest = args
    convs = problem.convolutions
    mid2 = conv(convs["2"], mid, w2, scale2, shift2, None)
    if problem.proj:
        residual = conv(convs["proj"], residual, *rest[:3], None)
    whole = conv(convs["3"], mid2, w3, scale3, shift3, residual)
    if problem.next:
        mid_next = conv(convs["next"], whole, *rest[3:], None)
    else:
        mid_next = whole.new_empty(problem.next_shape)
    if problem.store == "even":
        whole = whole[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    elif problem.store == "pool":
        whole = whole.mean((2, 3), keepdim=True)
    return whole, mid_next


def reference_chain(problem: ChainProblem, *args: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op ``bottleneck_chain`` in float64."""
    return compose_chain(problem, args, reference_conv)


def stock_chain(problem: ChainProblem, *args: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same op as stock torch computes it, each step rounding."""
    return compose_chain(problem, args, stock_conv)
