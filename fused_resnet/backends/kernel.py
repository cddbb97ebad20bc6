"""What every kernel of every backend is: a name, a claim of what it supports, and a way to run."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_resnet.problem import Problem


class Kernel(ABC):
    """One way to compute one op.

    A kernel is stateless apart from caches. ``run`` gets validated arguments: shapes and dtypes agree
    with the problem, every tensor lies on one device, nothing is empty. It allocates and returns its
    result, dense in channels_last order, and never synchronises with the device. For
    ``conv_affine_act`` and ``conv_affine_relu_maxpool`` its arguments are
    ``(problem, x, weight, scale, shift, residual)``; for ``add_relu`` they are ``(problem, a, b)``,
    and with ``problem.inplace`` the result is written to, and is, ``a``.
    """

    #: Backend the kernel belongs to, as users name it: ``torch``, ``library``, ``triton`` ...
    backend: ClassVar[str]
    #: The op it computes: ``conv_affine_act``, ``conv_affine_relu_maxpool`` or ``add_relu``.
    op: ClassVar[str]
    #: Name within the backend, as tables print it.
    name: ClassVar[str]

    @abstractmethod
    def supports(self, problem: Any, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else the reason why it does not."""

    def promising(self, problem: Any, device: torch.device) -> bool:
        """Whether this kernel is expected to be quick here; untuned choice tries such kernels first."""
        return True

    @abstractmethod
    def run(self, problem: Any, *args: Any) -> Tensor:
        """Compute the op; see the class for the arguments."""

    @property
    def full_name(self) -> str:
        """``backend/name``, unique among all kernels."""
        return f"{self.backend}/{self.name}"

    def __repr__(self) -> str:
        return f"<kernel {self.full_name} for {self.op}>"


class PackedKernel(Kernel):
    """A convolution kernel that wants its weights in a layout of its own.

    ``packed`` gives them, prepared once: the result is kept as long as the weight lives and is made
    anew when weight, scale or shift changed (version counter, contents), moved, or were replaced.

    Only a persistent weight (see `persistent`) is packed once. Any other tensor may be a temporary of
    compiled code, which writes one result after another into the same tensor object and moves no
    version counter: it is packed at every call.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        """The packed weights (and whatever else ``run`` derives from these three tensors)."""

    def pack_key(self, problem: Any) -> Hashable:
        """What of the problem the packed layout depends on; by default nothing."""
        return None

    def packed(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        """The prepared weights for this problem, from the cache where it is still true."""
        key = self.pack_key(problem)
        entry = self._entries.get(id(weight))
        if entry is not None and entry.holds(weight, scale, shift):
            packed = entry.packed.get(key, _ABSENT)
            if packed is not _ABSENT:
                return packed
        else:
            entry = None
        if entry is None and (capturing(weight.device) or not persistent(weight)):
            return self.prepare(problem, weight, scale, shift)
        # Seen before the work, so that an edit by another thread meanwhile makes the entry stale.
        seen = tuple(Seen(t) for t in (weight, scale, shift)) if entry is None else entry.seen
        # What was packed may share memory with scale and shift: never with a temporary's.
        scale, shift = seen[1].copy_of(scale), seen[2].copy_of(shift)
        packed = self.prepare(problem, weight, scale, shift)
        if capturing(weight.device):
            return packed
        with self._lock:
            if entry is None:
                ident = id(weight)
                owner = weakref.ref(weight, lambda ref: self._forget(ident, ref))
                entry = self._entries[ident] = _Entry(owner, seen)
            if len(entry.packed) >= _MAX_LAYOUTS:
                entry.packed.pop(next(iter(entry.packed)))
            entry.packed[key] = packed
        return packed

    def _forget(self, ident: int, ref: weakref.ref[Tensor]) -> None:
        entry = self._entries.get(ident)
        if entry is not None and entry.owner is ref:
            self._entries.pop(ident, None)


#: Layouts kept per weight: a model run at many shapes must not keep one copy of its weights for each.
_MAX_LAYOUTS = 4

_ABSENT = object()


class _Entry:
    """Packed layouts of one weight tensor, true while the three tensors are as they were seen."""

    __slots__ = ("owner", "packed", "seen")

    def __init__(self, owner: weakref.ref[Tensor], seen: tuple[Seen, ...]) -> None:
        self.owner = owner
        self.seen = seen
        self.packed: dict[Hashable, Any] = {}

    def holds(self, weight: Tensor, scale: Tensor, shift: Tensor) -> bool:
        of_weight, of_scale, of_shift = self.seen
        return (
            self.owner() is weight
            and of_weight.holds(weight)
            and of_scale.holds(scale)
            and of_shift.holds(shift)
        )


_kept: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def keep(tensor: Tensor) -> Tensor:
    """Declare ``tensor`` persistent, as long as it lives; returns it. See `persistent`."""
    _kept[tensor.data_ptr()] = tensor
    return tensor


def persistent(tensor: Tensor) -> bool:
    """Whether every change of ``tensor``'s contents moves its version counter or its storage.

    So it is for parameters and for what `keep` was told of, aliases included. It is not for inference
    tensors, which have no version counter, nor for the intermediate results of compiled code.
    """
    if tensor.is_inference():
        return False
    return isinstance(tensor, nn.Parameter) or tensor.data_ptr() in _kept


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is computed now has no values until its replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Seen:
    """A tensor as it was when something was derived from it, to tell later whether it still is so.

    A persistent tensor is known by address, version and dtype, together with its storage being alive,
    without which another tensor could have taken the address. Of another one the contents are
    compared; where that would make the device wait, it counts as changed.
    """

    __slots__ = ("_contents", "_state", "_storage")

    def __init__(self, tensor: Tensor) -> None:
        self._state: tuple[int, int, torch.dtype] | None = None
        self._storage: weakref.ref[torch.UntypedStorage] | None = None
        self._contents: Tensor | None = None
        if persistent(tensor):
            self._state = (tensor.data_ptr(), tensor._version, tensor.dtype)
            self._storage = weakref.ref(tensor.untyped_storage())
        elif tensor.device.type == "cpu":
            with torch.inference_mode(False):
                self._contents = tensor.detach().clone()

    def copy_of(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself if it is persistent, else the copy that was made of it."""
        return tensor if self._contents is None else self._contents

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is what was seen, unchanged."""
        if self._storage is not None:
            return (
                self._storage() is not None
                and not tensor.is_inference()
                and (tensor.data_ptr(), tensor._version, tensor.dtype) == self._state
            )
        return (
            self._contents is not None
            and tensor.dtype == self._contents.dtype
            and tensor.device == self._contents.device
            and torch.equal(tensor, self._contents)
        )


__all__ = ["Kernel", "PackedKernel", "Problem", "Seen", "capturing", "keep", "persistent"]
