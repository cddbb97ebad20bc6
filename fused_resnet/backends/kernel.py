"""What every kernel of every backend is: a name, a claim of what it supports, and a way to run."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_resnet.freshness import state_of
from fused_resnet.problem import Problem


class Kernel(ABC):
    """One way to compute one op.

    A kernel is stateless apart from caches. ``run`` gets validated arguments: shapes and dtypes
    agree with the problem, every tensor lies on one device, nothing is empty. It allocates and
    returns its result, dense in channels_last order, and never synchronises with the device. For
    ``conv_affine_act`` and ``conv_affine_relu_maxpool`` its arguments are ``(problem, x, weight,
    scale, shift, residual)``; for ``add_relu`` they are ``(problem, a, b)``, and with
    ``problem.inplace`` the result is written to, and is, ``a``.
    """

    #: Backend the kernel belongs to, as users name it: ``torch``, ``library``, ``triton`` ...
    backend: ClassVar[str]
    #: The op it computes: ``conv_affine_act``, ``conv_affine_relu_maxpool`` or ``add_relu``.
    op: ClassVar[str]
    #: Name within the backend, as tables print it.
    name: ClassVar[str]

    @abstractmethod
    def supports(self, problem: Any, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""

    def promising(self, problem: Any, device: torch.device) -> bool:
        """Whether this kernel is expected to be quick here; the untuned choice tries it first."""
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

    ``packed`` gives them, prepared once: the result is kept as long as the weight tensor lives and
    is made anew when weight, scale or shift changed (version counter), moved, or were replaced.
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
        state = state_of((weight, scale, shift))
        if state is None:
            # An inference tensor has no version counter, so an in-place edit would go unseen.
            return self.prepare(problem, weight, scale, shift)
        key = self.pack_key(problem)
        entry = self._entries.get(id(weight))
        if entry is not None and entry.state == state and entry.owner() is weight:
            packed = entry.packed.get(key)
            if packed is not None:
                return packed
        packed = self.prepare(problem, weight, scale, shift)
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is None or entry.owner() is not weight or entry.state != state:
                ident = id(weight)
                owner = weakref.ref(weight, lambda ref: self._forget(ident, ref))
                entry = self._entries[ident] = _Entry(owner, state, (scale, shift))
            if len(entry.packed) >= _MAX_LAYOUTS:
                entry.packed.pop(next(iter(entry.packed)))
            entry.packed[key] = packed
        return packed

    def _forget(self, ident: int, ref: weakref.ref[Tensor]) -> None:
        entry = self._entries.get(ident)
        if entry is not None and entry.owner is ref:
            self._entries.pop(ident, None)


#: Layouts kept per weight: a model run at many shapes must not keep one copy of its weights for
#: each.
_MAX_LAYOUTS = 4


class _Entry:
    """Packed layouts of one weight tensor, true while ``state`` is."""

    __slots__ = ("owner", "packed", "state", "vectors")

    def __init__(
        self, owner: weakref.ref[Tensor], state: Hashable, vectors: tuple[Tensor, Tensor]
    ) -> None:
        self.owner = owner
        self.state = state
        # Keeps scale and shift alive, so that no new tensor can take their address unnoticed.
        self.vectors = vectors
        self.packed: dict[Hashable, Any] = {}


__all__ = ["Kernel", "PackedKernel", "Problem"]
