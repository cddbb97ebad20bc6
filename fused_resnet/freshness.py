"""Knowing when something derived from tensors is out of date, without looking at their data."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

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

    It holds each tensor's address, version counter, dtype and device, so whoever keeps it must
    keep the tensors alive too: otherwise a new tensor could come to lie at the address of a dead
    one. Writes through ``tensor.data`` leave no trace in the version counter and are not seen.

    Returns:
        The value, or None if one of the tensors was made in inference mode and so keeps no version.
    """
    if _build.extension is not None:
        state: Hashable | None = _build.extension.state_of(tensors)
        return state
    return _state_in_python(tensors)
