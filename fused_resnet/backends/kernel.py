"""What every kernel of every backend is: a name, a claim of what it supports, and a way to run."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_resnet.freshness import Snapshot, capturing, persistent
from fused_resnet.problem import Problem


@dataclass(frozen=True, slots=True)
class Prepared:
    """Packed weights in the place of a weight: ``run`` takes them as they are and looks nothing up.

    A plan holds these and not the weight, so that no second copy of the weight stays in memory.
    """

    value: Any


class Kernel(ABC):
    """One way to compute one op.

    A kernel is stateless apart from caches. ``run`` gets validated arguments: shapes and dtypes
    agree with the problem, every tensor lies on one device, nothing is empty. It allocates and
    returns its result, dense in channels_last order, and never synchronises with the device. For
    ``conv_affine_act``, ``conv3d_affine_act`` and ``conv_affine_relu_maxpool`` its arguments are
    ``(problem, x, weight, scale, shift, residual)``; for ``add_relu`` they are ``(problem, a, b)``,
    and with ``problem.inplace`` the result is written to, and is, ``a``. For ``bottleneck_chain``
    they are the op's tensors, and two tensors are returned.
    """

    #: Backend the kernel belongs to, as users name it: ``torch``, ``library``, ``triton`` ...
    backend: ClassVar[str]
    #: The op it computes: ``conv_affine_act``, ``conv3d_affine_act``, ``conv_affine_relu_maxpool``,
    #: ``add_relu`` or ``bottleneck_chain``.
    op: ClassVar[str]
    #: Name within the backend, as tables print it.
    name: ClassVar[str]
    #: Whether its error is that of a plain sum of products, so that the rule of ``numerics`` holds
    #: for it whatever the weights. Others, as Winograd's, run only where a plan has measured their
    #: error on the layer at hand and the user's tolerance admits it.
    exact: ClassVar[bool] = True

    #: Whether there is ``run_into``.
    takes_out: ClassVar[bool] = False

    @abstractmethod
    def supports(self, problem: Any, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""

    def promising(self, problem: Any, device: torch.device) -> bool:
        """Whether this kernel is expected to be quick here; the untuned choice tries it first."""
        return True

    def variants(self, problem: Any, device: torch.device) -> tuple[Kernel, ...]:
        """The configurations of this kernel that are worth timing, most promising first.

        Each is a kernel by itself, the same object whenever asked for, whose name says the
        configuration. By default there is but one: the kernel as it is.
        """
        return (self,)

    @abstractmethod
    def run(self, problem: Any, *args: Any) -> Any:
        """Compute the op; see the class for the arguments and the result."""

    def run_into(self, problem: Any, out: Tensor, *args: Any) -> Any:
        """As ``run``, but the result is written to ``out``, as plans have it in their arena."""
        raise NotImplementedError(f"{self.full_name} makes its result itself")

    def expansion(self, problem: Any) -> int:
        """Bytes that a layer's packed weights take beyond the weight's own, but for padding."""
        return 0

    @property
    def full_name(self) -> str:
        """``backend/name``, unique among all kernels."""
        return f"{self.backend}/{self.name}"

    def __repr__(self) -> str:
        return f"<kernel {self.full_name} for {self.op}>"


class PackedKernel(Kernel):
    """A convolution kernel that wants its weights in a layout of its own.

    ``packed`` gives them, prepared once: the result is kept as long as the weight lives and is made
    anew when a source of it changed, moved, or was replaced (see `fused_resnet.freshness`).

    Only a persistent weight, such as a parameter, is packed once; any other tensor may be a
    temporary of compiled code and is packed at every call.
    """

    #: Whether ``prepare`` reads scale and shift, and not the weight alone.
    packs_vectors: ClassVar[bool] = True

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        """The packed weights (and whatever else ``run`` derives from these three tensors)."""

    def pack_key(self, problem: Any) -> Hashable:
        """What of the problem the packed layout depends on; by default nothing."""
        return None

    def prepared(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Prepared:
        """What ``run`` takes in the place of the weight; made anew, and kept nowhere."""
        return Prepared(self.prepare(problem, weight, scale, shift))

    def layout(self, problem: Any, device: torch.device) -> Hashable:
        """Problems of equal layouts share what is `prepared` of one weight."""
        return self.pack_key(problem)

    def packed(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        """The prepared weights for this problem, from the cache where it is still true."""
        if isinstance(weight, Prepared):
            return weight.value
        sources = (weight, scale, shift) if self.packs_vectors else (weight,)
        key = self.pack_key(problem)
        entry = self._entries.get(id(weight))
        if entry is not None and entry.owner() is weight and entry.snapshot.holds(sources):
            packed = entry.packed.get(key, _ABSENT)
            if packed is not _ABSENT:
                return packed
        else:
            entry = None
        if capturing(weight.device) or not persistent(weight):
            return self.prepare(problem, weight, scale, shift)
        # Taken before the work, so that an edit by another thread meanwhile makes the entry stale.
        snapshot = Snapshot(sources) if entry is None else entry.snapshot
        # What is packed may share memory with scale and shift: never with a temporary's.
        vectors = snapshot.safe(sources)[1:] or (scale, shift)
        packed = self.prepare(problem, weight, *vectors)
        with self._lock:
            if entry is None:
                ident = id(weight)
                owner = weakref.ref(weight, lambda ref: self._forget(ident, ref))
                entry = self._entries[ident] = _Entry(owner, snapshot)
            if len(entry.packed) >= _MAX_LAYOUTS:
                entry.packed.pop(next(iter(entry.packed)))
            entry.packed[key] = packed
        return packed

    def _forget(self, ident: int, ref: weakref.ref[Tensor]) -> None:
        entry = self._entries.get(ident)
        if entry is not None and entry.owner is ref:
            self._entries.pop(ident, None)


class PackedChainKernel(PackedKernel):
    """A kernel for chained bottlenecks that wants each of its weights in a layout of its own.

    ``prepare`` and what rests on it take in the place of a problem one of the `layouts`.
    """

    @abstractmethod
    def layouts(self, problem: Any, device: torch.device) -> tuple[Any, ...]:
        """What to pack the weights for: of the 3x3, the 1x1, the projection and the next 1x1.

        Those of convolutions that the problem does not have mean nothing.
        """


#: Layouts kept per weight: a model run at many shapes must not keep a copy of its weights for each.
_MAX_LAYOUTS = 4

_ABSENT = object()


class _Entry:
    """Packed layouts of one weight tensor, true while ``snapshot`` holds."""

    __slots__ = ("owner", "packed", "snapshot")

    def __init__(self, owner: weakref.ref[Tensor], snapshot: Snapshot) -> None:
        self.owner = owner
        self.snapshot = snapshot
        self.packed: dict[Hashable, Any] = {}


__all__ = ["Kernel", "PackedChainKernel", "PackedKernel", "Prepared", "Problem"]
