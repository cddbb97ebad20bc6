"""Stock torch as the measure of others: whether it is right itself.

The rule allows twice stock torch's error, which is no rule where stock torch is wrong: its bf16
convolutions on the CPU are off by 0.7 where ``OMP_THREAD_LIMIT`` is below its number of threads. An
error of stock torch is therefore explained before it is trusted, by

- rounding: four times what rounding each step of the op to its dtype makes of exact sums, which is
  found by doing so; a result that cancels, or that a ReLU leaves little of, has more of it;
- sums: the square root of their number of terms, times the rounding unit that products are summed
  in, times the sum of the products' sizes.

What is far more than that is a fault, and marked as one (`Error.rounding`): results are then held
against what is explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.numerics import (
    Error,
    compose_chain,
    convolve,
    error,
    reference_conv,
    round_behind_conv,
)
from fused_resnet.problem import AddReluProblem, ChainProblem, Convolution, Problem

#: Every result of an op, as most have one.
Results = tuple[Tensor, ...]

#: Given functions that compute a convolution and a chain as `numerics.reference_conv` and
#: `numerics.reference_chain` do, an op's results by them.
Compute = Callable[[Callable[..., Tensor], Callable[..., Results]], Results]

#: So many times what rounding by itself does is still explained.
_SLACK = 4.0

#: A network whose stock result has lost so many times half of the dtype's digits says nothing.
_LOST = 4.0

#: Rounding unit of factors where torch is told to multiply fp32 in another format.
_FACTORS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


def errors_of(results: Results, exact: Results) -> tuple[Error, ...]:
    """How far each result is from its reference."""
    return tuple(error(r, e) for r, e in zip(results, exact, strict=True))


def marked(
    found: tuple[Error, ...], problem: Problem, exact: Results, compute: Compute
) -> tuple[Error, ...]:
    """Stock torch's errors, with what rounding explains beside those that it does not explain.

    Args:
        found: stock torch's error of each result.
        problem: what was computed.
        exact: the results in float64.
        compute: computes the op anew; called only where an error is conspicuous.
    """
    unit, spread = torch.finfo(problem.dtype).eps, _spread_of_sums(problem, exact)
    if all(e.finite and max(e.l2, e.worst) <= 2 * unit + spread for e in found):
        return found
    if isinstance(problem, AddReluProblem):
        limits: tuple[Error, ...] = (Error(2 * unit, 2 * unit),)
    else:
        rounded = errors_of(compute(_rounded_conv, _rounded_chain), exact)
        sizes = compute(_size_of_conv, _size_of_chain)
        limits = tuple(
            _explained(r, size, e, spread) for r, size, e in zip(rounded, sizes, exact, strict=True)
        )
    return tuple(
        e if _is_explained(e, limit, right) else replace(e, rounding=limit)
        for e, limit, right in zip(found, limits, exact, strict=True)
    )


def fault_of_network(found: Error, dtype: torch.dtype) -> str | None:
    """None if a whole network's error by stock torch may serve as a measure, else why not.

    Layers amplify errors, so that no rounding unit bounds them. A result that has lost more than
    half of its digits is no measure, whether it is wrong or its network is too sensitive.
    """
    limit = _LOST * torch.finfo(dtype).eps ** 0.5
    if found.l2 <= limit:
        return None
    return (
        f"stock torch's own error is {found}, where at most {limit:.1e} can be expected: it is "
        "wrong itself, or the network too sensitive for this dtype"
    )


def _spread_of_sums(problem: Problem, exact: Results) -> float:
    """Error of a sum, relative to the sum of its terms' sizes."""
    if isinstance(problem, AddReluProblem):
        return 0.0
    convs = problem.convolutions.values() if isinstance(problem, ChainProblem) else (problem,)
    terms = max(math.prod(p.weight_shape[1:]) for p in convs)
    summed_in = torch.float64 if problem.dtype == torch.float64 else torch.float32
    spread = math.sqrt(terms) * torch.finfo(summed_in).eps
    if problem.dtype == torch.float32:
        cuda = exact[0].device.type == "cuda"
        library: Any = torch.backends.cudnn if cuda else torch.backends.mkldnn
        spread += _FACTORS.get(library.conv.fp32_precision, 0.0)
    return spread


def _explained(rounded: Error, size: Tensor, exact: Tensor, spread: float) -> Error:
    # How large the terms are beside the result: as far off as a result would be by all of them.
    both = exact.isfinite() & size.isfinite()
    exact = torch.where(both, exact, 0.0)
    terms = error(exact + torch.where(both, size, 0.0), exact)
    return Error(
        _SLACK * rounded.l2 + spread * terms.l2,
        _SLACK * rounded.worst + spread * terms.worst,
        rounded.finite,
    )


def _is_explained(found: Error, limit: Error, exact: Tensor) -> bool:
    # What becomes of a NaN that was given is a matter of taste; one from nowhere is none.
    made_up = not found.finite and limit.finite and bool(exact.isfinite().all())
    return not made_up and found.l2 <= limit.l2 and found.worst <= limit.worst


def _rounded_conv(
    problem: Convolution,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """As `numerics.stock_conv`, with exact sums."""
    sums = convolve(problem, x.double(), weight.double())
    return round_behind_conv(problem, sums.to(x.dtype), scale, shift, residual)


def _rounded_chain(problem: ChainProblem, *args: Tensor | None) -> Results:
    return compose_chain(problem, args, _rounded_conv)


def _size_of_conv(problem: Convolution, *args: Tensor | None) -> Tensor:
    """The sum of the sizes of everything that is summed for a result, in float64."""
    x, weight, scale, shift, residual = (None if a is None else a.double().abs() for a in args)
    assert x is not None
    assert weight is not None
    assert scale is not None
    assert shift is not None
    return reference_conv(problem, x, weight, scale, shift, residual)


def _size_of_chain(problem: ChainProblem, *args: Tensor | None) -> Results:
    return compose_chain(problem, args, _size_of_conv)


__all__ = ["Compute", "Results", "errors_of", "fault_of_network", "marked"]
