"""What the programs of one plan derive from its weights: packed layouts and copies, each once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends.kernel import Kernel, PackedChainKernel, PackedKernel, Prepared
from fused_resnet.fold import Recipe
from fused_resnet.graph import Graph, Named
from fused_resnet.layers import Chained, Conv, Conv3d


class Weights:
    """What the programs of one plan have derived from one set of weights, each thing once.

    Nothing here shares memory with ``state``: training the model on does not change a plan.

    Args:
        state: parameters and buffers by name.
        copied: whether they are nobody else's memory: read from a file whenever they are asked for.
    """

    def __init__(self, state: Mapping[str, Tensor], copied: bool = False) -> None:
        self.state = state
        self._fingerprint: str | None = None  # of the state that was let go
        self._memory = set() if copied else {_address(t) for t in state.values()}
        self._packed: dict[Hashable, Prepared] = {}
        self._own: dict[Named | Recipe, Tensor] = {}
        #: Bytes of what was packed by kernels that need more than the weights, beyond these.
        self.expansion = 0

    def packed(
        self,
        kernel: PackedKernel,
        layer: Conv | Conv3d,
        graph: Graph,
        constants: Mapping[int, Tensor],
    ) -> Prepared:
        """The layer's weight as its kernel wants it."""
        operands = tuple(constants[i] for i in layer.constants)
        vectors = layer.constants[1:] if kernel.packs_vectors else ()
        return self.packed_as(kernel, layer.problem, graph, layer.weight, operands, vectors)

    def packed_as(
        self,
        kernel: PackedKernel,
        problem: Any,
        graph: Graph,
        weight: int,
        operands: tuple[Tensor, ...],
        vectors: tuple[int, ...] = (),
    ) -> Prepared:
        """The constant ``weight`` (and ``vectors``, if they are packed too) packed for a problem.

        Args:
            kernel: what packs.
            problem: what for, as the kernel's ``prepare`` takes it.
            graph: whose constants these are.
            weight: a constant.
            operands: weight [K, C / groups, R, S], scale and shift, as tensors.
            vectors: scale and shift, as constants.
        """
        layout = kernel.layout(problem, operands[0].device)
        origins = tuple(graph.origins.get(i) for i in (weight, *vectors))
        # Graphs of several shapes name the same weights alike; what has no name is not shared.
        known = all(isinstance(origin, Named | Recipe) for origin in origins)
        key: Hashable = (kernel, layout, origins if known else (id(graph), weight, *vectors))
        if key not in self._packed:
            prepared = kernel.prepared(problem, *operands)
            value = _detached(prepared.value, operands)
            self.expansion += kernel.expansion(problem)
            self._packed[key] = Prepared(value)
        return self._packed[key]

    def of_chain(
        self, kernel: Kernel, layer: Chained, graph: Graph, constants: Mapping[int, Tensor]
    ) -> list[Any]:
        """The layer's weights, scales and shifts as its kernel's ``run`` takes them."""
        found: list[Any] = []
        layouts: tuple[Any, ...] = ()
        if isinstance(kernel, PackedChainKernel):
            layouts = kernel.layouts(layer.problem, constants[layer.constants[0]].device)
        for number in range(len(layer.weights) // 3):
            triple = tuple(i for i in layer.weights[3 * number :][:3] if i is not None)
            if not triple:
                found += (None, None, None)
                continue
            operands = tuple(constants[i] for i in triple)
            weight, *vectors = triple
            first: Any
            if isinstance(kernel, PackedChainKernel):
                packs = tuple(vectors) if kernel.packs_vectors else ()
                layout = layouts[number]
                first = self.packed_as(kernel, layout, graph, weight, operands, packs)
            else:
                first = self.own(graph, weight, constants)
            found += [first, *(self.own(graph, i, constants) for i in vectors)]
        return found

    def own(self, graph: Graph, value: int, constants: Mapping[int, Tensor]) -> Tensor:
        """A constant that steps read as it is: a copy where it is the model's memory."""
        origin = graph.origins.get(value)
        if isinstance(origin, Named | Recipe) and origin in self._own:
            return self._own[origin]
        tensor = constants[value]
        if _address(tensor) in self._memory:
            tensor = tensor.clone(memory_format=torch.preserve_format)
        if isinstance(origin, Named | Recipe):
            self._own[origin] = tensor
        return tensor

    def release(self) -> None:
        """Let go of the weights themselves: no more programs can be made."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.state)
            self.state = {}

    def made_of(self, state: Mapping[str, Tensor]) -> bool:
        """Whether everything here is derived from such weights, bit for bit."""
        return fingerprint(state) == (self._fingerprint or fingerprint(self.state))

    @property
    def bytes(self) -> int:
        """Bytes of everything that was derived."""
        tensors = [
            t
            for value in (*(p.value for p in self._packed.values()), *self._own.values())
            for t in _tensors(value)
        ]
        return sum({_address(t): _size(t) for t in tensors}.values())


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A number that changes with the name, dtype, shape or any bit of any of the tensors."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach()
        hashed.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        hashed.update(t.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return hashed.hexdigest()


def _tensors(value: Any) -> list[Tensor]:
    """Tensors in packed weights: a tensor, or a named tuple or dataclass of some."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for part in value for t in _tensors(part)]
    return [t for part in getattr(value, "__dict__", {}).values() for t in _tensors(part)]


def _address(t: Tensor) -> int:
    return id(t) if t.layout != torch.strided else t.untyped_storage().data_ptr()


def _size(t: Tensor) -> int:
    return (
        t.numel() * t.element_size() if t.layout != torch.strided else t.untyped_storage().nbytes()
    )


def _detached(value: Any, sources: Sequence[Tensor]) -> Any:
    """Packed weights, with a copy in the place of each tensor that is a source's memory still."""
    shared = {_address(t) for t in sources}
    if isinstance(value, Tensor):
        return value.clone() if _address(value) in shared else value
    if isinstance(value, tuple):
        parts = [_detached(part, sources) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Such as a tensor descriptor, which holds the memory that it describes.
        old = {name: part for name, part in vars(value).items() if isinstance(part, Tensor)}
        return dataclasses.replace(value, **{n: _detached(t, sources) for n, t in old.items()})
    return value


__all__ = ["Weights", "fingerprint"]
