"""Calls of the fused convolution that were prepared before, found again in a microsecond.

Behind every call stand the same questions: do these modules still compute what their classes say,
did a parameter change, which kernel runs? For a small image the answers cost more than the
convolution. A compiled guard (csrc/ops_call_guard.cpp) keeps all that they depend on; while it
holds, and nobody watches ops on this thread (autograd, autocast, a profiler, a mode or a
transform), the kernel is called at once. Without the compiled extension nothing is remembered.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_resnet import _build, backends, ops


class _Call(NamedTuple):
    """What a call came to, true while ``guard`` holds."""

    guard: Any
    act_before_add: bool
    forced: tuple[str, ...] | None
    generation: tuple[int, bool, bool]
    choice: backends.Choice
    scale: Tensor
    shift: Tensor


class _Calls(NamedTuple):
    """The calls of one convolution, latest first."""

    owner: weakref.ref[nn.Module]
    calls: tuple[_Call, ...]


#: Calls kept per convolution: it may run at several batch sizes and resolutions in turn.
_MAX_CALLS = 4

_remembered: dict[int, _Calls] = {}
_lock = threading.Lock()


def recall(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | None,
    residual: Tensor | None,
    act_before_add: bool,
) -> Tensor | None:
    """The result of ``act(bn(conv(x)) + residual)`` if this call was remembered, else None."""
    entry = _remembered.get(id(conv))
    if entry is None or entry.owner() is not conv or forward_ad._current_level >= 0:
        return None
    for call in entry.calls:
        if (
            call.guard.holds(x, residual, conv, bn, act)
            and call.act_before_add == act_before_add
            and call.forced == backends.forced()
            and call.generation == backends.generation()
        ):
            weight = conv._parameters["weight"]
            assert weight is not None
            return ops.run_conv(call.choice, x, weight, call.scale, call.shift, residual)
    return None


def remember(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | None,
    residual: Tensor | None,
    act_before_add: bool,
    constants: tuple[Tensor, Tensor, Tensor],
    geometry: tuple[Any, ...],
) -> None:
    """Remember a call of ``act(bn(conv(x)) + residual)`` that was just made, if it can be guarded.

    ``constants`` are the weight, scale and shift that it came to, ``geometry`` stride, padding,
    dilation, groups and epilogue.
    """
    if _build.extension is None:
        return
    guard = _build.extension.CallGuard.of(x, residual, conv, bn, act)
    # A call that somebody watches is not worth a place: it would not be recalled either.
    if guard is None or not guard.holds(x, residual, conv, bn, act):
        return
    forced, generation = backends.forced(), backends.generation()
    choice = ops.choose_conv(x, *constants, residual, *geometry)
    call = _Call(guard, act_before_add, forced, generation, choice, *constants[1:])
    ident = id(conv)
    with _lock:
        entry = _remembered.get(ident)
        if entry is None or entry.owner() is not conv:
            owner = weakref.ref(conv, lambda ref: _forget(ident, ref))
            _remembered[ident] = _Calls(owner, (call,))
        else:
            _remembered[ident] = _Calls(entry.owner, (call, *entry.calls[: _MAX_CALLS - 1]))


def _forget(ident: int, ref: weakref.ref[nn.Module]) -> None:
    entry = _remembered.get(ident)
    if entry is not None and entry.owner is ref:
        _remembered.pop(ident, None)
