"""A whole network's result against float64: what inexact kernels add up to.

Each layer by an inexact kernel is within a tolerance of its own. That says nothing of a network of
fifty: here its outputs are held against the rule of `fused_resnet.numerics`, as `check` does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.layers import Layers
from fused_resnet.numerics import error, largest
from fused_resnet.proving import stock_result, walk
from fused_resnet.source import Source, cast_floating
from fused_resnet.stock import fault_of_network
from fused_resnet.tuning import reference


class Judging(Protocol):
    """Says whether a network's result is right."""

    def fault(self, result: Any) -> str | None:
        """None if what a program returned satisfies the rule, else what is wrong."""


class Judge:
    """Judges outputs for one set of arguments; computes what it compares with when first asked.

    Of a large batch only the first and the last image are judged.

    Args:
        source: the model.
        args: of its forward.
        kwargs: likewise.
    """

    def __init__(self, source: Source, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._source = source
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        counts = {t.shape[0] if t.dim() else 0 for t in tensors}
        self._batch = counts.pop() if len(counts) == 1 else 0
        self._arguments = pytree.tree_map_only(Tensor, self._ends, (args, dict(kwargs)))
        self._expected: tuple[list[Any], list[list[Any]]] | None = None

    def fault(self, result: Any) -> str | None:
        """None if what a program returned satisfies the rule, else what is wrong."""
        if self._expected is None:
            self._expected = self._compute()
        exact, stocks = self._expected
        return _fault([self._ends(t) for t in _tensors(result)], exact, stocks, self._source.dtype)

    def _ends(self, t: Tensor) -> Tensor:
        """The first and the last image of a tensor that has a batch of them."""
        if self._batch <= 2 or t.dim() == 0 or t.shape[0] != self._batch:
            return t
        last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.cat((t[:1], t[-1:])).contiguous(memory_format=layout)

    def _compute(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        source, (args, kwargs) = self._source, self._arguments

        def layout(given: Any, to: torch.memory_format) -> Any:
            def convert(t: Tensor) -> Tensor:
                return t.contiguous(memory_format=to) if t.dim() == 4 else t

            return pytree.tree_map_only(Tensor, convert, given)

        with torch.inference_mode(False), torch.no_grad(), backends.backend("torch"):
            stocks = []
            for to in (torch.contiguous_format, torch.channels_last):
                a, k = layout((args, kwargs), to)
                stocks.append(_tensors(source(*a, **k)))
            wide = copy.deepcopy(source.model).double()
            given = (args, kwargs)
            if source.dtype is not None:
                given = cast_floating(given, source.dtype)
            a, k = cast_floating(given, torch.float64)
            exact = _tensors(wide(*a, **k))
        return exact, stocks


class GraphJudge:
    """Judges outputs where the model itself is not kept: layer by layer in float64.

    Args:
        layers: of the network.
        state: its parameters and buffers.
        inputs: of the graph.
        dtype: that the network computes in.
    """

    def __init__(
        self,
        layers: Layers,
        state: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._layers = layers
        self._state = state
        self._inputs = inputs
        self._dtype = dtype

    def fault(self, result: Any) -> str | None:
        """None if what a program returned satisfies the rule, else what is wrong with it."""
        layers = self._layers
        wide, inputs = cast_floating((dict(self._state), list(self._inputs)), torch.float64)
        try:
            exact = walk(layers, wide, inputs, lambda _layer, task: reference(task))
        except (RuntimeError, TypeError) as e:  # An operator between that wants its own dtype.
            return f"it cannot be computed in float64 ({e})"
        stock = walk(layers, self._state, self._inputs, stock_result)
        return _fault(_tensors(result), _tensors(exact), [_tensors(stock)], self._dtype)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _fault(
    found: Sequence[Tensor],
    exact: Sequence[Tensor],
    stocks: Sequence[Sequence[Tensor]],
    dtype: torch.dtype | None,
) -> str | None:
    """What is wrong with results in ``dtype`` (None: that of stock's) by the rule."""
    for i, (ours, right) in enumerate(zip(found, exact, strict=True)):
        if not right.is_floating_point() or not right.numel():
            continue
        allowed = largest(*(error(stock[i], right) for stock in stocks))
        off, kind = error(ours, right), stocks[0][i].dtype if dtype is None else dtype
        wrong = fault_of_network(allowed, kind)
        if wrong is not None:
            return wrong
        if not off.within(allowed, kind):
            return f"the network's error is {off}, stock torch's is {allowed}"
    return None


__all__ = ["GraphJudge", "Judge", "Judging"]
