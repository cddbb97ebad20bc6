"""Measuring: every kernel for one problem, verified against float64, then timed in turn.

How a problem is measured:

1. Candidates are all kernels of the op that support it, in all configurations worth timing, stock
   torch among them. One that fails its entrance test is out.
2. Each runs on the layer's real input and weights. Its error against float64 must satisfy the rule
   of `fused_resnet.numerics`, which is looser for inexact kernels: their errors are recorded, for
   the user's tolerance to be compared with. One that raises is out, with one warning. Stock torch
   itself is out where its error is more than rounding explains (see `fused_resnet.stock`).
3. What is left is timed in rounds, the order rotating, so that whatever the machine does meanwhile
   meets all alike. One of whose calls none comes near the best's after some rounds leaves.

What else a machine does only ever adds to the time of a call, and with threads that wait for each
other it adds much: a kernel that two threads share takes many times as long while one of them does
not run. So the lower quartile of the calls counts, and while the fastest kernel's calls differ
much, rounds go on. How much they differed in the end is kept: `Entry.spread`.

Native kernels write to memory that is there, as in a plan. On the CPU the caches are swept before
each call of a layer whose weights are larger than its activations: in a network such weights come
from memory, and kernels that need more bytes for them must pay for that here too.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.backends.kernel import Kernel, PackedChainKernel, PackedKernel
from fused_resnet.backends.verify import is_out_of_memory
from fused_resnet.numerics import (
    Error,
    fault,
    largest,
    reference_chain,
    reference_conv,
    stock_chain,
    stock_conv,
)
from fused_resnet.problem import (
    AddReluProblem,
    ChainProblem,
    Convolution,
    ConvProblem,
    Problem,
    channels_last_format,
)
from fused_resnet.stock import Results, errors_of, marked
from fused_resnet.tuned_table import Entry, Timing
from fused_resnet.warn import FusedResNetWarning

#: Images that errors are taken from at once, at most, and bytes in float64: they need memory.
_CHUNK, _CHUNK_BYTES = 4, 32 * 2**20
#: Rounds after which a kernel leaves whose fastest call took so many times as long as the best's.
_EARLY_ROUNDS, _FAR_BEHIND = 4, 1.5
#: Measuring goes on, for so many times as long, while the fastest kernel's spread is above this.
_STEADY, _PERSISTENCE = 1.15, 3
#: Bytes that are written to sweep the caches.
_SWEEP = 32 * 2**20


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        name: ``balanced`` or ``max``.
        rounds: at least so many.
        seconds: for each candidate, unless the rounds take longer.
        variants: whether all configurations of a kernel compete, rather than its own choice alone.
    """

    name: str
    rounds: int
    seconds: float
    variants: bool


#: By mode; ``strict`` differs from ``balanced`` in what may be chosen, not in what is measured.
EFFORTS = {
    "balanced": Effort("balanced", 7, 0.1, variants=False),
    "strict": Effort("balanced", 7, 0.1, variants=False),
    "max": Effort("max", 25, 0.4, variants=True),
}


@dataclass(frozen=True)
class Instead:
    """What the kernels of a task have to beat: others that compute the same in several steps.

    Attributes:
        full_name: as in the table.
        call: computes it, from nothing.
    """

    full_name: str
    call: Callable[[], Any]
    exact = True

    @property
    def name(self) -> str:
        """As a kernel's."""
        return self.full_name


@dataclass(frozen=True)
class Task:
    """A problem to measure, with the tensors of the first layer that has it.

    Attributes:
        op: name of the op.
        problem: what is computed.
        device: where.
        args: as `Kernel.run` takes them, after the problem.
        instead: what is timed in the place of stock torch, if something is.
    """

    op: str
    problem: Problem
    device: torch.device
    args: tuple[Tensor | None, ...]
    instead: Instead | None = None

    @property
    def cost(self) -> float:
        """A guess at the time it takes, for the order of tuning: operations, or bytes if more."""
        flops = 0 if isinstance(self.problem, AddReluProblem) else self.problem.flops
        return max(flops / 16, self.problem.min_bytes)


@dataclass(eq=False)
class _Candidate:
    kernel: Kernel | Instead
    call: Callable[[], Any]
    error: Error
    samples: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return lower_quartile(self.samples)

    @property
    def spread(self) -> float:
        """Half of the calls took at least so many times as long as `seconds`."""
        return statistics.median_high(self.samples) / max(self.seconds, 1e-9)


def lower_quartile(samples: Sequence[float]) -> float:
    """The sample that at least a quarter of them are not above."""
    return sorted(samples)[(len(samples) - 1) // 4]


def measure(task: Task, effort: Effort) -> Entry:
    """Verify and time every kernel for a task.

    Returns:
        Its entry for the table. Of stock torch, unless it is wrong, or of what the task says
        instead, there always is a timing; it leads the entry in the latter case, so that near-ties
        are its.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = reference(task)
        allowed = error_of_stock(task, exact)
        found: list[_Candidate] = []
        rejected: list[tuple[str, str]] = []
        if task.instead is not None:
            task.instead.call()
            found.append(_Candidate(task.instead, task.instead.call, largest(*allowed)))
        out = _place(task)
        for kernel in contenders(task, effort):
            outcome = _verified(kernel, task, exact, allowed, out)
            if isinstance(outcome, str):
                rejected.append((kernel.full_name, outcome))
            else:
                found.append(outcome)
        del exact
        _time(found, task, effort)
    timings = tuple(
        Timing(c.kernel.full_name, c.seconds, c.error.l2, c.kernel.exact) for c in found
    )
    stock_error = largest(*allowed).l2
    spread = min(found, key=lambda c: c.seconds).spread if found else 1.0
    return Entry(stock_error, timings, tuple(rejected), effort.name, time.time(), spread)


def contenders(task: Task, effort: Effort) -> list[Kernel]:
    """All kernels of the op, simplest first; those that do not support the problem as they are."""
    found: list[Kernel] = []
    for kernel in backends.KERNELS:
        if kernel.op != task.op or (task.instead is not None and kernel.backend == "torch"):
            continue
        supported = kernel.supports(task.problem, task.device) is None
        every = effort.variants and supported
        found += kernel.variants(task.problem, task.device) if every else (kernel,)
    return found


def is_current(entry: Entry, task: Task, effort: Effort) -> bool:
    """Whether an entry of the table says all that measuring anew would."""
    if effort.name == "max" and entry.effort != "max":
        return False
    names = [k.full_name for k in contenders(task, effort)]
    names += [] if task.instead is None else [task.instead.full_name]
    return all(name in entry.considered for name in names)


def _place(task: Task) -> Tensor | None:
    """Memory for the results of kernels that take it; None if none does.

    A plan's kernels write where others wrote before. Fresh memory comes in pages that the system
    maps and clears one by one, which can take longer than a convolution of few channels.
    """
    p = task.problem
    takers = (k for k in backends.KERNELS if k.op == task.op and k.takes_out)
    if not isinstance(p, ConvProblem) or all(k.supports(p, task.device) for k in takers):
        return None
    format_ = torch.channels_last
    return torch.empty(p.out_shape, dtype=p.dtype, device=task.device, memory_format=format_)


def call_of(kernel: Kernel, task: Task, out: Tensor | None = None) -> Callable[[], Any]:
    """A function of nothing that runs ``kernel`` on a task, its weights packed beforehand.

    A kernel that takes memory for its result writes to ``out``, if there is one.
    """
    problem, args = task.problem, task.args
    if isinstance(kernel, PackedChainKernel):
        assert isinstance(problem, ChainProblem)
        mid, shortcut, *convs = args
        made: list[Any] = []
        for i, layout in enumerate(kernel.layouts(problem, task.device)):
            weight, scale, shift = convs[3 * i : 3 * i + 3]
            if weight is not None and scale is not None and shift is not None:
                made += [kernel.prepared(layout, weight, scale, shift), scale, shift]
            else:
                made += [None, None, None]
        args = (mid, shortcut, *made)
    elif isinstance(kernel, PackedKernel):
        x, weight, scale, shift, *rest = args
        packed: Any = kernel.prepared(problem, weight, scale, shift)  # type: ignore[arg-type]
        args = (x, packed, scale, shift, *rest)
    if isinstance(problem, AddReluProblem) and problem.inplace:
        a, b = args
        assert a is not None
        target = a.clone()
        return lambda: kernel.run(problem, target.copy_(a), b)
    if kernel.takes_out and out is not None:
        return functools.partial(kernel.run_into, problem, out, *args)
    return lambda: kernel.run(problem, *args)


# --------------------------------------------------------------------------------------------------
# Right or wrong.
# --------------------------------------------------------------------------------------------------


def results_of(returned: Any) -> Results:
    """What a kernel returned, as a tuple."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def reference(task: Task) -> Results:
    """The task's results in float64, computed a few images at a time."""
    if isinstance(task.problem, AddReluProblem):
        a, b = _two(task)
        return (torch.relu(a.double() + b.double()),)
    return _piecewise(task, reference_conv, reference_chain)


def error_of_stock(task: Task, exact: Results) -> tuple[Error, ...]:
    """Stock torch's errors in the task's dtype and in channels_last, the ops' own layout.

    One that rounding does not explain is marked, see `fused_resnet.stock`.
    """
    if isinstance(task.problem, AddReluProblem):
        a, b = _two(task)
        results: Results = (torch.relu(a + b),)
    else:
        results = _piecewise(task, stock_conv, stock_chain, last=True)
    found = errors_of(results, exact)
    return marked(found, task.problem, exact, lambda *compute: _piecewise(task, *compute))


def _two(task: Task) -> tuple[Tensor, Tensor]:
    a, b = task.args
    assert a is not None
    assert b is not None
    return a, b


def _piecewise(
    task: Task,
    conv: Callable[..., Tensor],
    chain: Callable[..., Results],
    last: bool = False,
) -> Results:
    """The task as these functions compute it, a few images (in channels_last) at a time."""
    p = task.problem
    pieces: list[Results] = []
    for given, *rest in _pieces(task):
        x = given.contiguous(memory_format=channels_last_format(given)) if last else given
        if isinstance(p, ChainProblem):
            pieces.append(chain(replace(p, n=x.shape[0]), x, *rest))
        else:
            pieces.append((conv(p, x, *rest),))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _pieces(task: Task) -> list[tuple[Any, ...]]:
    """The arguments for a few images at a time; weights are the same for all."""
    args = task.args
    batched = (0, 1) if isinstance(task.problem, ChainProblem) else (0, 4)
    x = args[0]
    assert x is not None
    size = _images_at_once(task.problem)
    count = len(x.split(size))
    columns = [
        a.split(size) if i in batched and a is not None else [a] * count for i, a in enumerate(args)
    ]
    return list(zip(*columns, strict=True))


def _images_at_once(problem: Problem) -> int:
    """How many images are computed in float64 together."""
    if not isinstance(problem, Convolution):
        return _CHUNK
    # The operands of the products are written out, of each output pixel its window of x; of the
    # result there are three while the epilogue is computed.
    windows = problem.flops // (2 * problem.k)
    words = windows + 3 * problem.n * problem.k * math.prod(problem.conv_size)
    fitting: int = _CHUNK_BYTES * problem.n // (8 * words)
    return max(1, min(_CHUNK, fitting))


def _verified(
    kernel: Kernel,
    task: Task,
    exact: Results,
    allowed: tuple[Error, ...],
    out: Tensor | None = None,
) -> _Candidate | str:
    """The kernel ready to be timed, or why it is out.

    What it leaves in ``out`` is overwritten by the next one that writes there.
    """
    reason = kernel.supports(task.problem, task.device)
    if reason is None:
        reason = backends.verdict(kernel, task.device, task.problem.dtype)
    if reason is not None:
        return reason
    try:
        call = call_of(kernel, task, out)
        if out is not None:
            out.fill_(math.nan)  # Nothing that another kernel left there may count as this one's.
        results = results_of(call())
        if [r.shape for r in results] != [e.shape for e in exact] or any(
            r.dtype != task.problem.dtype for r in results
        ):
            return "it returned " + ", ".join(f"{tuple(r.shape)} {r.dtype}" for r in results)
        found = errors_of(results, exact)
    except Exception as e:
        if kernel.backend == "torch":
            raise
        reason = f"it raised {type(e).__name__}: {e}"
        if not is_out_of_memory(e):
            warnings.warn(
                f"{kernel.full_name} is skipped for {task.problem}: {reason}",
                FusedResNetWarning,
                stacklevel=2,
            )
        return reason
    for ours, stocks in zip(found, allowed, strict=True):
        reason = fault(ours, stocks, task.problem.dtype, kernel.exact)
        if reason is not None:
            return reason
    return _Candidate(kernel, call, largest(*found))


# --------------------------------------------------------------------------------------------------
# Fast or slow.
# --------------------------------------------------------------------------------------------------


def _time(found: Sequence[_Candidate], task: Task, effort: Effort) -> None:
    """Fill in the samples of all candidates."""
    clock = _cuda_seconds if task.device.type == "cuda" else _cpu_seconds
    sweep = _sweeper(task)
    if not found:
        return
    running = list(found)
    for c in running:
        c.samples = [clock(c.call, 1, sweep)]  # The second call: the first was its verification.
    start = time.monotonic()
    for round_ in range(10_000):
        if round_ >= effort.rounds:
            fastest = min(running, key=lambda c: c.seconds)
            budget = effort.seconds * len(running)
            if fastest.spread > _STEADY:
                budget *= _PERSISTENCE
            if time.monotonic() - start >= budget:
                # The machine was quicker while these were there: they are measured with the rest.
                early = [c for c in found if c not in running and c.seconds < fastest.seconds]
                if not early:
                    break
                running += early
                start = time.monotonic()
        for c in running[round_ % len(running) :] + running[: round_ % len(running)]:
            # Short calls are timed many at a time; not where each call needs caches swept.
            calls = 1 if sweep is not None else max(1, math.ceil(2e-4 / max(c.samples[0], 1e-7)))
            c.samples.append(clock(c.call, calls, sweep))
        if round_ + 1 == _EARLY_ROUNDS:
            limit = _FAR_BEHIND * min(min(c.samples) for c in running)
            running = [c for c in running if min(c.samples) <= limit]
    for c in found:
        c.samples = c.samples[1:]


def _cpu_seconds(call: Callable[[], Any], calls: int, sweep: Callable[[], None] | None) -> float:
    if sweep is not None:
        sweep()
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / 1e9 / calls


def _cuda_seconds(call: Callable[[], Any], calls: int, sweep: Callable[[], None] | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sweep is not None:
        sweep()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def _sweeper(task: Task) -> Callable[[], None] | None:
    """What sweeps the caches before a call; None where nothing would be gained by it."""
    p = task.problem
    if not isinstance(p, Convolution) or task.device.type != "cpu":
        return None
    if math.prod(p.weight_shape) <= math.prod(p.in_shape) + math.prod(p.out_shape):
        return None
    buffer = torch.empty(_SWEEP, dtype=torch.uint8)

    def sweep() -> None:
        buffer.zero_()

    return sweep


__all__ = [
    "EFFORTS",
    "Effort",
    "Instead",
    "Results",
    "Task",
    "call_of",
    "contenders",
    "error_of_stock",
    "is_current",
    "lower_quartile",
    "measure",
    "reference",
    "results_of",
]
