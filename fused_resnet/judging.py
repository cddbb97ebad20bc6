"""A whole network's result against float64: what inexact kernels add up to.

Each layer by an inexact kernel is within a tolerance of its own. That says nothing of a network of
fifty: here its outputs are held against the rule of `fused_resnet.numerics`, as `check` does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.numerics import error, largest
from fused_resnet.source import Source, cast_floating


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
        found = [self._ends(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        for i, (ours, reference) in enumerate(zip(found, exact, strict=True)):
            if not reference.is_floating_point() or not reference.numel():
                continue
            allowed = largest(*(error(stock[i], reference) for stock in stocks))
            dtype = stocks[0][i].dtype if self._source.dtype is None else self._source.dtype
            off = error(ours, reference)
            if not off.within(allowed, dtype):
                return f"the network's error is {off}, stock torch's is {allowed}"
        return None

    def _ends(self, t: Tensor) -> Tensor:
        """The first and the last image of a tensor that has a batch of them."""
        if self._batch <= 2 or t.dim() == 0 or t.shape[0] != self._batch:
            return t
        last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.cat((t[:1], t[-1:])).contiguous(memory_format=layout)

    def _compute(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        source, (args, kwargs) = self._source, self._arguments

        def tensors(result: Any) -> list[Tensor]:
            return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]

        def layout(given: Any, to: torch.memory_format) -> Any:
            def convert(t: Tensor) -> Tensor:
                return t.contiguous(memory_format=to) if t.dim() == 4 else t

            return pytree.tree_map_only(Tensor, convert, given)

        with torch.inference_mode(False), torch.no_grad(), backends.backend("torch"):
            stocks = []
            for to in (torch.contiguous_format, torch.channels_last):
                a, k = layout((args, kwargs), to)
                stocks.append(tensors(source(*a, **k)))
            wide = copy.deepcopy(source.model).double()
            given = (args, kwargs)
            if source.dtype is not None:
                given = cast_floating(given, source.dtype)
            a, k = cast_floating(given, torch.float64)
            exact = tensors(wide(*a, **k))
        return exact, stocks


__all__ = ["Judge"]
