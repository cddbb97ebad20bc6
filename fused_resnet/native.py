"""Which layers the native CPU program computes, and how they are written down for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fused_resnet.backends.kernel import Kernel, Prepared
from fused_resnet.graph import Meta
from fused_resnet.layers import Conv, Layer

#: Steps of ``backends.cpu_program`` that stand for one layer.
Part = tuple[Any, ...]


def joins(layer: Conv, kernel: Kernel) -> bool:
    """Whether a convolution by this kernel may be part of a native program."""
    return False


def part(
    layer: Layer,
    kernel: Kernel | None,
    packed: Prepared | None,
    constants: Mapping[int, Tensor],
    meta: Mapping[int, Meta],
) -> Part | None:
    """The steps that stand for a layer; None if the native program has none for it."""
    return None


def program(
    parts: Sequence[Part], meta: Mapping[int, Meta], inputs: Sequence[int], outputs: Sequence[int]
) -> Any:
    """The native program of consecutive parts."""
    raise NotImplementedError
