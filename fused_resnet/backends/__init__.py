"""Which kernel runs: the registry of all kernels, the override, and the choice among them.

Order of choice: what the user forces > what was measured (see `fused_resnet.tuned_table`) >
heuristic order. A kernel is offered a problem only if it
says that it supports it and has been verified in this process, on this device and dtype, against
float64; stock torch comes last and always can. Every refusal is kept with its reason: `choose`
returns them, and `observe` tells which kernels ran.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet import _build
from fused_resnet.backends import cpu, cuda, cuda_chain, cudnn, library, torch_, triton_
from fused_resnet.backends.kernel import Kernel, PackedKernel, Prepared
from fused_resnet.backends.verify import is_out_of_memory, verify
from fused_resnet.problem import AddReluProblem, Problem
from fused_resnet.tuned_table import table
from fused_resnet.warn import FusedResNetWarning

#: Every kernel, those of the backend that heuristics prefer first. ``torch`` is last: it can do
#: all.
KERNELS: tuple[Kernel, ...] = (
    *cpu.KERNELS,
    *library.KERNELS,
    *triton_.KERNELS,
    *cuda.KERNELS,
    *cuda_chain.KERNELS,
    *cudnn.KERNELS,
    *torch_.KERNELS,
)

#: Backends by name, in heuristic order.
NAMES: tuple[str, ...] = tuple(dict.fromkeys(k.backend for k in KERNELS))

#: Environment variable that forces backends: one name, or several separated by commas.
ENV = "FUSED_RESNET_BACKEND"


@dataclass(frozen=True)
class Choice:
    """The kernel that computes a problem, and why the ones before it do not.

    Attributes:
        kernel: what runs.
        problem: what it computes.
        device: where.
        rejected: (full name, reason) of every kernel that was considered first.
    """

    kernel: Kernel
    problem: Problem
    device: torch.device
    rejected: tuple[tuple[str, str], ...] = ()


_observers: ContextVar[tuple[list[Choice], ...]] = ContextVar("fused_resnet_observers", default=())
_lock = threading.RLock()
# (kernel, op, device, dtype) -> None once verified, else why it must not be used.
_verdicts: dict[tuple[Kernel, torch.device, torch.dtype], str | None] = {}
_warned: set[str] = set()
_generation = 0


def _validated(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}; available: {', '.join(NAMES)}")
    if not names:
        raise ValueError(f"name at least one backend of {', '.join(NAMES)}")
    return names


def _from_environment() -> tuple[tuple[str, ...] | None, str | None]:
    """What the environment variable forces, if anything; and what is wrong with it, if anything."""
    value = os.environ.get(ENV, "")
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        return None, None
    try:
        return _validated(names), None
    except ValueError as e:
        return names, f"environment variable {ENV}={value!r}: {e}"


#: The override within this thread or task; the environment variable, read once, is its default. A
#: wrong one is an error where it would count, and not before: `fused-resnet doctor` must run.
_ENVIRONMENT, environment_error = _from_environment()
_forced: ContextVar[tuple[str, ...] | None] = ContextVar(
    "fused_resnet_backend", default=_ENVIRONMENT
)

#: The backends that `backend` or the environment variable force at this point, if any.
forced = _forced.get


@contextlib.contextmanager
def backend(*names: str) -> Iterator[None]:
    """Force a backend, or several in order of preference, within a ``with`` block.

    A problem that none of them supports is still computed, by stock torch, and a
    `FusedResNetWarning` says so once. The block affects the current thread (or task) only.

    Args:
        *names: of ``fused_resnet.backends.NAMES``.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> with fused_resnet.backend("torch"):
        ...     y = model(x)
    """
    token = _forced.set(_validated(names))
    try:
        yield
    finally:
        _forced.reset(token)


def generation() -> tuple[int, bool, bool]:
    """What changes whenever an earlier choice may no longer hold.

    That is when a kernel was rejected or kernels were measured, and when oneDNN or cuDNN is
    switched on or off, as ``torch.backends.mkldnn.flags`` and ``torch.backends.cudnn.flags`` do.
    """
    return _generation, torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()


@contextlib.contextmanager
def observe() -> Iterator[list[Choice]]:
    """Collect the choice behind every fused op that runs within the block, in order.

    Example:
        >>> with fused_resnet.backends.observe() as choices:
        ...     model(x)
        >>> print(choices[0].kernel.full_name)
    """
    seen: list[Choice] = []
    token = _observers.set((*_observers.get(), seen))
    try:
        yield seen
    finally:
        _observers.reset(token)


def candidates(op: str, problem: Problem, device: torch.device) -> list[Kernel]:
    """All exact kernels of ``op`` in the order in which they would be tried, supported or not.

    Raises:
        ValueError: an environment variable forces something that does not exist.
    """
    names = forced()
    if _build.isa_error is not None:
        raise ValueError(_build.isa_error)
    if environment_error is not None and names == _ENVIRONMENT:
        raise ValueError(environment_error)
    order = NAMES if names is None else (*(n for n in names if n != "torch"), "torch")
    if names is not None and "torch" in names:
        order = names[: names.index("torch") + 1]
    ranked = [k for name in order for k in KERNELS if k.op == op and k.backend == name and k.exact]

    def rank(kernel: Kernel) -> tuple[bool, int, bool]:
        # An order that the user gave holds among backends; else what is promising goes first.
        place = 0 if names is None else order.index(kernel.backend)
        return kernel.backend == "torch", place, not kernel.promising(problem, device)

    return sorted(ranked, key=rank)  # stable: in heuristic order where nothing else decides


def named(op: str, name: str, problem: Problem, device: torch.device) -> Kernel | None:
    """The kernel of this full name that computes ``problem``, configurations included."""
    for kernel in KERNELS:
        if kernel.op != op or not name.startswith(kernel.backend):
            continue
        if kernel.full_name == name:
            return kernel if kernel.supports(problem, device) is None else None
        if kernel.supports(problem, device) is None:
            for variant in kernel.variants(problem, device):
                if variant.full_name == name:
                    return variant if variant.supports(problem, device) is None else None
    return None


def _measured(op: str, problem: Problem, device: torch.device) -> list[Kernel]:
    """The exact kernels that were measured on this problem, fastest first."""
    entry = table().entry(op, problem, device)
    if entry is None:
        return []
    found = (named(op, t.kernel, problem, device) for t in entry.ranked(tolerance=None))
    return [kernel for kernel in found if kernel is not None]


def choose(op: str, problem: Problem, device: torch.device) -> Choice:
    """The first candidate that supports the problem and is verified on this device.

    Unless a backend is forced, those that were measured on this problem come first, fastest first.

    Args:
        op: name of the op without its namespace.
        problem: what is to be computed.
        device: of the tensors.
    """
    rejected: list[tuple[str, str]] = []
    order = candidates(op, problem, device)
    if forced() is None:
        order = list(dict.fromkeys((*_measured(op, problem, device), *order)))
    for kernel in order:
        reason = kernel.supports(problem, device)
        if reason is None:
            reason = verdict(kernel, device, problem.dtype)
        if reason is None:
            names = forced()
            if names is not None and kernel.backend not in names:
                why = "; ".join(f"{name}: {text}" for name, text in rejected)
                why = why or f"it has no kernel for {op}"
                forced_names = ",".join(names)
                # Once for each reason and not for each problem, of which there may be ever new
                # ones.
                _warn_once(
                    f"backend {forced_names} was forced but cannot compute {problem} ({why}); "
                    f"{kernel.full_name} runs instead",
                    key=f"{forced_names} {op} {why}",
                )
            return Choice(kernel, problem, device, tuple(rejected))
        rejected.append((kernel.full_name, reason))
    raise RuntimeError(f"no kernel computes {problem} on {device}: {rejected}")


def heuristic(op: str, problem: Problem, device: torch.device) -> Kernel:
    """The kernel that would be chosen if nothing had been measured."""
    for kernel in candidates(op, problem, device):
        if kernel.supports(problem, device) is None and (
            verdict(kernel, device, problem.dtype) is None
        ):
            return kernel
    raise RuntimeError(f"no kernel computes {problem} on {device}")


def verdict(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if ``kernel`` may be used on ``device``, else why not; verified when first asked."""
    if kernel.backend == "torch":
        return None
    key = (kernel, device, dtype)
    if key not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "not verified yet, and a CUDA graph is being captured; run once before capture"
        with _lock:
            if key not in _verdicts:
                reason = verify(kernel, device, dtype)
                _verdicts[key] = reason
                if reason is not None:
                    _warn_once(f"{kernel.full_name} is not used on {device} in {dtype}: {reason}")
    return _verdicts[key]


def run(choice: Choice, *args: Tensor | None) -> Any:
    """Run a choice; if its kernel raises, say so once and run the next one.

    Out-of-memory errors are the caller's to handle and pass through.
    """
    kernel = choice.kernel
    try:
        result = kernel.run(choice.problem, *args)
    except Exception as e:
        if kernel.backend == "torch" or is_out_of_memory(e):
            raise
        reject(kernel, choice.device, choice.problem.dtype, f"it raised {type(e).__name__}: {e}")
        if isinstance(choice.problem, AddReluProblem) and choice.problem.inplace:
            # It may have written to a part of its operand, so nothing could be computed from it.
            raise
        return run(choose(kernel.op, choice.problem, choice.device), *args)
    for seen in _observers.get():
        seen.append(choice)
    return result


def forget_choices() -> None:
    """Have every choice made anew, since something was measured."""
    global _generation
    with _lock:
        _generation += 1


def reject(kernel: Kernel, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    """Never use ``kernel`` again on this device and dtype in this process, and warn once why."""
    global _generation
    with _lock:
        _verdicts[kernel, device, dtype] = reason
        _generation += 1
    _warn_once(f"{kernel.full_name} is no longer used on {device} in {dtype}: {reason}")


def _warn_once(message: str, key: str | None = None) -> None:
    """Warn, but once only for each ``key`` (by default the message)."""
    key = message if key is None else key
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(message, FusedResNetWarning, stacklevel=_users_frame())


def _users_frame() -> int:
    """The ``stacklevel`` at which `_warn_once` names the line that called torch or this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


#: Where library code lies; the second are the forwards that `fused_resnet.fuse` writes.
_LIBRARIES = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    "<fused_resnet ",
    os.path.dirname(os.path.abspath(torch.__file__)),
)


__all__ = [
    "ENV",
    "KERNELS",
    "NAMES",
    "Choice",
    "FusedResNetWarning",
    "Kernel",
    "PackedKernel",
    "Prepared",
    "backend",
    "candidates",
    "choose",
    "environment_error",
    "forced",
    "forget_choices",
    "generation",
    "heuristic",
    "named",
    "observe",
    "reject",
    "run",
    "verdict",
]
