"""Which layers a native CPU program computes, and how they are written down for it.

Convolutions by native kernels, sums, max-poolings, global means and linear layers become steps of
``backends.cpu_program``. A conversion of the input's dtype is left to the stem, which reads any;
the flattening behind a global mean is nothing at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import cpu
from fused_resnet.backends.cpu_program import (
    AddRelu,
    Conv,
    Convert,
    CpuProgram,
    GlobalAveragePool,
    MaxPool,
    Step,
)
from fused_resnet.backends.kernel import Kernel, PackedKernel
from fused_resnet.graph import Graph, Meta, Ref
from fused_resnet.layers import AddRelu as AddReluLayer
from fused_resnet.layers import Chained, Conv3d, Layer, Layers, Plain
from fused_resnet.layers import Conv as ConvLayer
from fused_resnet.problem import ConvProblem
from fused_resnet.problem import MaxPool as Window
from fused_resnet.weights import Weights

_ATEN = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16)
_FLATTEN = (_ATEN.flatten.using_ints, _ATEN.view.default, _ATEN.reshape.default)


@dataclass
class Segments:
    """How the layers of a graph fall into native programs and the rest.

    Args:
        layers: of the graph.
        kernels: chosen ones, by the result of each layer.
        weights: where packed weights are kept.
        constants: values of the graph's constants.
    """

    layers: Layers
    kernels: Mapping[int, Kernel]
    weights: Weights
    constants: Mapping[int, Tensor]
    _instead: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = self.layers.layers
        for first, second in itertools.pairwise(order):
            if self._readers(first.result) != 1 or second.reads != (first.result,):
                continue
            if self._is_conversion(first) and self._is_stem(second):
                self._instead[first.result] = first.reads[0]
            elif self._is_mean(first) and self._is_flatten(second):
                self._instead[first.result] = second.result

    def steps(self, layer: Layer) -> list[Step] | None:
        """What stands for a layer; None if no native step does."""
        meta = self.meta.get(layer.result)
        if meta is None or meta.device.type != "cpu" or meta.dtype not in _DTYPES:
            return None
        if isinstance(layer, ConvLayer):
            return self._conv(layer)
        if isinstance(layer, Chained | Conv3d):
            return None
        if isinstance(layer, AddReluLayer):
            kernel = self.kernels[layer.result]
            ours = isinstance(kernel, cpu.NativeAddRelu) and len(meta.shape) == 4
            return [AddRelu(layer.a, layer.b, layer.result)] if ours else None
        return self._plain(layer)

    @property
    def meta(self) -> Mapping[int, Meta]:
        """Of the graph."""
        return self.layers.graph.meta

    def _readers(self, value: int) -> int:
        outputs = [leaf.id for leaf in self.layers.graph.outputs if isinstance(leaf, Ref)]
        reads = [i for layer in self.layers.layers for i in layer.reads]
        return (reads + outputs).count(value)

    # --------------------------------------------------------------------------------- convolutions

    def _is_stem(self, layer: Layer) -> bool:
        kernel = self.kernels.get(layer.result)
        return isinstance(layer, ConvLayer) and isinstance(kernel, cpu.NativeStem)

    def _conv(self, layer: ConvLayer) -> list[Step] | None:
        kernel = self.kernels[layer.result]
        if not isinstance(kernel, cpu.NativeConv | cpu.NativeStem):
            return None
        packed = self.weights.packed(kernel, layer, self.layers.graph, self.constants)
        scale, shift = (
            self.weights.own(self.layers.graph, i, self.constants)
            for i in (layer.scale, layer.shift)
        )
        x = self._instead.get(layer.x, layer.x) if self._is_stem(layer) else layer.x
        return [
            Conv(
                x, layer.result, layer.problem, kernel.name, packed.value, scale, shift,
                layer.residual,
            )
        ]  # fmt: skip

    # ---------------------------------------------------------------------------------- the others

    def _plain(self, layer: Plain) -> list[Step] | None:
        if layer.result in self._instead and self._is_conversion(layer):
            return []  # The stem reads what was to be converted.
        if self._is_conversion(layer):
            # Only what comes from outside may be converted; torch does the rest.
            made = {other.result for other in self.layers.layers}
            return None if layer.reads[0] in made else [Convert(layer.reads[0], layer.result)]
        if self._is_mean(layer):
            made_here = self._instead.get(layer.result, layer.result)
            return [GlobalAveragePool(layer.reads[0], made_here)]
        if self._is_flatten(layer) and layer.result in self._instead.values():
            return []  # The mean made it.
        return self._max_pool(layer) or self._linear(layer)

    def _is_conversion(self, layer: Layer) -> bool:
        return (
            isinstance(layer, Plain)
            and layer.call.op is _ATEN.to.dtype
            and len(layer.call.args) == 2
            and not layer.call.kwargs
            and len(layer.reads) == 1
            and len(self.meta[layer.result].shape) == 4
            and self.meta[layer.result].dtype in _DTYPES
            and self.meta[layer.reads[0]].dtype in (*_DTYPES, torch.float16)
        )

    def _is_mean(self, layer: Layer) -> bool:
        if not isinstance(layer, Plain) or len(layer.reads) != 1:
            return False
        call = layer.call
        if len(self.meta[layer.reads[0]].shape) != 4 or call.kwargs:
            return False
        if call.op is _ATEN.adaptive_avg_pool2d.default:
            return list(call.args[1]) in ([1, 1], [1])
        if call.op is not _ATEN.mean.dim or len(call.args) not in (2, 3):
            return False
        return sorted(d % 4 for d in call.args[1]) == [2, 3]

    def _is_flatten(self, layer: Layer) -> bool:
        if not isinstance(layer, Plain) or len(layer.reads) != 1 or layer.constants:
            return False
        if layer.call.op not in _FLATTEN:
            return False
        before, after = self.meta[layer.reads[0]].shape, self.meta[layer.result].shape
        return len(before) == 4 and before[2:] == (1, 1) and after == before[:2]

    def _max_pool(self, layer: Plain) -> list[Step] | None:
        call = layer.call
        if call.op is not _ATEN.max_pool2d.default or len(self.meta[layer.result].shape) != 4:
            return None
        defaults: list[Any] = [None, None, [], [0, 0], [1, 1], False]
        _, kernel, stride, padding, dilation, ceil = [
            *call.args,
            *defaults[len(call.args) :],
        ]
        if call.kwargs or ceil or any(d != 1 for d in dilation):
            return None
        window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding))
        return [MaxPool(layer.reads[0], layer.result, window)]

    def _linear(self, layer: Plain) -> list[Step] | None:
        call = layer.call
        if call.op is not _ATEN.linear.default or len(layer.reads) != 1 or call.kwargs:
            return None
        x, weight, *rest = call.args
        bias = rest[0] if rest else None
        constants = [weight.id, *([] if bias is None else [bias.id])]
        shape = self.meta[x.id].shape
        if x.id not in layer.reads or len(shape) != 2 or set(constants) != set(layer.constants):
            return None
        w = self.constants[weight.id]
        k, c = w.shape
        # A convolution of images of one pixel.
        p = ConvProblem(
            shape[0], c, 1, 1, k, 1, 1, (1, 1), (0, 0), (1, 1), 1, "none",
            self.meta[layer.result].dtype,
        )  # fmt: skip
        named = (n for n in cpu.KERNELS if isinstance(n, PackedKernel) and n.name == "direct")
        kernel = next(named, None)
        if kernel is None or kernel.supports(p, w.device) is not None:
            return None
        scale = torch.ones(k)
        shift = torch.zeros(k) if bias is None else self.constants[bias.id].float().clone()
        packed = self.weights.packed_as(
            kernel, p, self.layers.graph, weight.id, (w.view(k, c, 1, 1), scale, shift)
        )
        return [Conv(x.id, layer.result, p, kernel.name, packed.value, scale, shift)]


def program(
    steps: Sequence[Step], graph: Graph, inputs: Sequence[int], outputs: Sequence[int]
) -> CpuProgram:
    """The native program of consecutive steps."""
    used = {*inputs, *(step.y for step in steps)}
    values = {i: (graph.meta[i].shape, graph.meta[i].dtype) for i in used}
    return CpuProgram(steps, values, inputs, outputs)


def is_worth_it(steps: Sequence[Step]) -> bool:
    """Whether steps contain a convolution: single poolings are no quicker here than in torch."""
    return any(isinstance(step, Conv) for step in steps)


def _pair(value: Any) -> tuple[int, int]:
    values = [int(v) for v in value]
    return values[0], values[-1]


__all__ = ["Segments", "is_worth_it", "program"]
