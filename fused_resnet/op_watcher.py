"""Seeing every fused op of a run, with its arguments, the kernel behind it and its result."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import backends
from fused_resnet import ops as _ops  # noqa: F401  registers torch.ops.fused_resnet

#: The tensors that an op was given, in its order, as they were before; None for one it lacks.
Operands = list[Tensor | None]


class OpWatcher(TorchDispatchMode):
    """Within a ``with`` block, calls `saw` for each fused op that computed something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @abstractmethod
    def saw(self, choice: backends.Choice, operands: Operands, result: Any) -> None:
        """One op: its kernel, what it was given, and what came of it (a tuple, if several)."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "fused_resnet":
            return func(*args, **kwargs)
        inplace = func is torch.ops.fused_resnet.add_relu_.default
        given = [a for a in args if a is None or isinstance(a, Tensor)]
        operands = [a.clone() if inplace and a is not None else a for a in given]
        with backends.observe() as choices:
            result = func(*args, **kwargs)
        if choices:  # An empty batch leaves nothing to compute.
            self.saw(choices[-1], operands, args[0] if inplace else result)
        return result


__all__ = ["OpWatcher", "Operands"]
