"""What `Plan.memory` says: the bytes of a plan, and those of stock torch for the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fused_resnet.console import megabytes
from fused_resnet.program import Program
from fused_resnet.weights import Weights


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a plan and of stock torch for the same network.

    Activations are counted from the lifetimes of values at the largest of the plan's shapes, not
    measured: stock torch's as eager execution holds them, with ReLU and sums in place, and on the
    CPU with the copy of a weight that oneDNN makes in its own order at every call.

    Attributes:
        weights: packed ones, and others that the plan holds.
        expansion: bytes of the packed weights that are there since kernels keep weights in a larger
            form, as Winograd's transformed ones.
        stock_weights: parameters and buffers of the model.
        arena: activations of native programs.
        activations: all other activations.
        stock_activations: stock torch's, and that copy.
    """

    weights: int
    stock_weights: int
    arena: int
    activations: int
    stock_activations: int
    expansion: int = 0

    @property
    def total(self) -> int:
        """All bytes of the plan."""
        return self.weights + self.arena + self.activations

    @property
    def stock_total(self) -> int:
        """All bytes of stock torch."""
        return self.stock_weights + self.stock_activations

    def __str__(self) -> str:
        text = (
            f"weights {megabytes(self.weights)} (stock {megabytes(self.stock_weights)}), "
            f"activations {megabytes(self.arena + self.activations)} "
            f"(stock {megabytes(self.stock_activations)})"
        )
        if not self.expansion:
            return text
        return (
            f"{text}; {megabytes(self.expansion)} of the weights are there since some kernels keep "
            "them transformed, which optimize(..., compact=True) leaves out"
        )


def memory_report(
    programs: Sequence[Program], weights: Weights, like: Mapping[str, Tensor]
) -> MemoryReport:
    """The bytes of programs that share ``weights``; ``like`` are the model's tensors."""
    stock = sum(t.numel() * t.element_size() for t in like.values())
    found = [program.memory for program in programs]
    largest = max(found, key=lambda m: m.stock_activations, default=None)
    if largest is None:
        return MemoryReport(weights.bytes, stock, 0, 0, 0, weights.expansion)
    return MemoryReport(
        weights.bytes,
        stock,
        sum(m.arena for m in found),
        largest.activations,
        largest.stock_activations,
        weights.expansion,
    )


__all__ = ["MemoryReport", "memory_report"]
