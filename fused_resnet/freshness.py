"""Knowing when something derived from tensors is out of date, without looking at their data."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from fused_resnet import _build

#: Tensors that something was derived from; None stands for one that is absent.
Sources = tuple[Tensor | None, ...]


def _state_in_python(tensors: Sources) -> Hashable | None:
    state: list[Hashable] = []
    for t in tensors:
        if t is None:
            state.append(None)
        elif t.is_inference():
            return None
        else:
            state.append((t.data_ptr(), t._version, t.dtype, t.device))
    return tuple(state)


def state_of(tensors: Sources) -> Hashable | None:
    """A value that changes when a tensor is edited in place, moved, converted or replaced.

    It holds each tensor's address, version counter, dtype and device. An address says something
    only as long as the storage behind it lives: keep `storages` beside the value. Writes through
    ``tensor.data`` leave no trace in the version counter and are not seen.

    Returns:
        The value, or None if one of the tensors was made in inference mode and has no version.
    """
    if _build.extension is not None:
        state: Hashable | None = _build.extension.state_of(tensors)
        return state
    return _state_in_python(tensors)


def storages(tensors: Sources) -> tuple[weakref.ref[torch.UntypedStorage], ...]:
    """Weak references to the memory of ``tensors``: one that is dead has left its address free."""
    return tuple(weakref.ref(t.untyped_storage()) for t in tensors if t is not None)


_kept: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def keep(tensor: Tensor) -> Tensor:
    """Declare ``tensor`` persistent, as long as it lives; returns it. See `persistent`."""
    _kept[tensor.data_ptr()] = tensor
    return tensor


def persistent(tensor: Tensor) -> bool:
    """Whether every change of ``tensor``'s contents moves its version counter or its storage.

    So it is for parameters and for what `keep` was told of, aliases included. It is not for
    inference tensors, which have no version counter, nor for the intermediate results of compiled
    code, which writes one after another into the same memory, and even into the same object.
    """
    if tensor.is_inference():
        return False
    return isinstance(tensor, nn.Parameter) or tensor.data_ptr() in _kept


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is computed now has no values yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Snapshot:
    """Tensors as they were when something was derived from them, to tell later if they still are.

    Persistent tensors are known by `state_of`, together with their storages being alive. Of others
    the contents are compared; where that would make a device wait, they count as changed.
    """

    __slots__ = ("_copies", "_state", "_storages")

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        lasting = tuple(t if persistent(t) else None for t in tensors)
        self._state = state_of(lasting)
        self._storages = storages(lasting)
        self._copies: tuple[Tensor | None, ...] | None = None
        if any(t is None for t in lasting):
            with torch.inference_mode(False):
                self._copies = tuple(
                    t.detach().clone() if p is None else None
                    for t, p in zip(tensors, lasting, strict=True)
                )

    def safe(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``tensors``, those that are not persistent replaced by copies which nobody overwrites."""
        if self._copies is None:
            return tensors
        return tuple(
            t if copy is None else copy for t, copy in zip(tensors, self._copies, strict=True)
        )

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether ``tensors`` are what was seen, unchanged."""
        lasting: Sources = tensors
        if self._copies is not None:
            for t, copy in zip(tensors, self._copies, strict=True):
                if copy is not None and not _same_on_cpu(t, copy):
                    return False
            lasting = tuple(
                t if copy is None else None for t, copy in zip(tensors, self._copies, strict=True)
            )
        return state_of(lasting) == self._state and all(ref() is not None for ref in self._storages)


def _same_on_cpu(t: Tensor, copy: Tensor) -> bool:
    return (
        t.device.type == "cpu"
        and copy.device.type == "cpu"
        and t.dtype == copy.dtype
        and torch.equal(t, copy)
    )
