"""What a graph's calls are to a plan: convolutions and sums that kernels compete for, and the rest.

Plain convolutions of ATen with constant weights become problems too: their scale is 1, their shift
the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.graph import Call, Graph, Literal, Ref, constant_calls
from fused_resnet.problem import (
    DTYPES,
    AddReluProblem,
    ChainProblem,
    Conv3dProblem,
    Convolution,
    ConvProblem,
    MaxPool,
)


@dataclass(frozen=True)
class _Convolution:
    """A convolution with its epilogue (and pooling); fields are values.

    Attributes:
        name: path of the convolution in the model, as far as it is known.
        op: name of the op.
        problem: what is computed.
        result: the value that it makes.
        x: its input.
        weight: a constant.
        scale: a constant, fp32 [K].
        shift: a constant, fp32 [K].
        residual: what the epilogue adds.
    """

    name: str
    op: str
    problem: Convolution
    result: int
    x: int
    weight: int
    scale: int
    shift: int
    residual: int | None = None

    @property
    def results(self) -> tuple[int, ...]:
        """Values that it makes."""
        return (self.result,)

    @property
    def reads(self) -> tuple[int, ...]:
        """Values other than constants that it reads."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def constants(self) -> tuple[int, ...]:
        """Constants that it reads."""
        return self.weight, self.scale, self.shift

    @property
    def operands(self) -> tuple[int | None, ...]:
        """As `Kernel.run` takes them."""
        return self.x, self.weight, self.scale, self.shift, self.residual


@dataclass(frozen=True)
class Conv(_Convolution):
    """A convolution of images."""

    problem: ConvProblem


@dataclass(frozen=True)
class Conv3d(_Convolution):
    """A convolution of videos."""

    problem: Conv3dProblem


@dataclass(frozen=True)
class AddRelu:
    """``relu(a + b)``."""

    name: str
    op: str
    problem: AddReluProblem
    result: int
    a: int
    b: int

    @property
    def results(self) -> tuple[int, ...]:
        """Values that it makes."""
        return (self.result,)

    @property
    def reads(self) -> tuple[int, ...]:
        """Values that it reads."""
        return self.a, self.b

    @property
    def constants(self) -> tuple[int, ...]:
        """None."""
        return ()

    @property
    def operands(self) -> tuple[int | None, ...]:
        """As `Kernel.run` takes them."""
        return self.a, self.b


@dataclass(frozen=True)
class Plain:
    """Any other call, run as torch runs it."""

    name: str
    call: Call
    reads: tuple[int, ...]
    constants: tuple[int, ...]

    @property
    def result(self) -> int:
        """The value that it makes."""
        return self.call.result

    @property
    def results(self) -> tuple[int, ...]:
        """Values that it makes."""
        return (self.result,)


@dataclass(frozen=True)
class Chained:
    """A bottleneck from its 3x3 on, and the next one's first 1x1, as one call; see `chaining`.

    Attributes:
        name: of the convolutions that it computes.
        op: name of the op.
        problem: what is computed.
        result: the block's output, or what is kept of it.
        mid_next: the next block's first activation; None if it is not computed.
        x: input of the 3x3.
        shortcut: the residual, or the input of the projection.
        weights: weight, scale and shift of the 3x3, the 1x1, the projection and the next 1x1; each
            a constant, or None where there is no such convolution.
        block: the value that the 3x3 by itself would make, by which the bottleneck is known.
        ends: the value that the 1x1 by itself would make: all pixels of the block's output.
        parts: the layers that would compute the same, in order.
    """

    name: str
    op: str
    problem: ChainProblem
    result: int
    mid_next: int | None
    x: int
    shortcut: int
    weights: tuple[int | None, ...]
    block: int
    ends: int
    parts: tuple[Conv | Plain, ...]

    @property
    def results(self) -> tuple[int, ...]:
        """Values that it makes."""
        return (self.result,) if self.mid_next is None else (self.result, self.mid_next)

    @property
    def reads(self) -> tuple[int, ...]:
        """Values other than constants that it reads."""
        return self.x, self.shortcut

    @property
    def constants(self) -> tuple[int, ...]:
        """Constants that it reads."""
        return tuple(i for i in self.weights if i is not None)

    @property
    def operands(self) -> tuple[int | None, ...]:
        """As `Kernel.run` takes them."""
        return self.x, self.shortcut, *self.weights


@dataclass(frozen=True)
class Span:
    """How much of a bottleneck and its surroundings one chained call computes.

    Attributes:
        block: the value that the bottleneck's 3x3 by itself would make.
        following: whether the next block's first 1x1 is part of it.
        projection: whether the 1x1 in the shortcut is.
        store: as in `ChainProblem`.
    """

    block: int
    following: bool
    projection: bool
    store: str


#: Layers that kernels compete for.
Tunable = Conv | Conv3d | AddRelu | Chained
Layer = Tunable | Plain


@dataclass(frozen=True)
class Layers:
    """A graph as layers.

    Attributes:
        source: the graph that was lowered.
        graph: with the constants that lowering added.
        constant: calls that depend on constants only.
        layers: all others, in order.
        spans: which bottlenecks are chained, and how.
    """

    source: Graph
    graph: Graph
    constant: tuple[Call, ...]
    layers: tuple[Layer, ...]
    spans: tuple[Span, ...] = ()


def lower(graph: Graph) -> Layers:
    """Sort the calls of a graph."""
    lowering = _Lowering(graph)
    layers = tuple(map(lowering.layer, lowering.rest))
    return Layers(graph, lowering.graph, tuple(lowering.constant), layers)


_OPS = torch.ops.fused_resnet
_CONV, _STEM = _OPS.conv_affine_act.default, _OPS.conv_affine_relu_maxpool.default
_ADD_RELU = _OPS.add_relu.default
_CONV3D = _OPS.conv3d_affine_act.default
_CONV2D = torch.ops.aten.conv2d.default


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.graph = replace(graph, origins=dict(graph.origins), meta=dict(graph.meta))
        constant, self.rest = constant_calls(graph)
        self.constant = list(constant)
        self.known = {*graph.origins, *(c.result for c in constant)}
        self.names = graph.names()
        self.next = graph.fresh()

    def layer(self, call: Call) -> Layer:
        if call.op in (_CONV, _STEM):
            return self.fused_conv(call) or self.plain(call)
        if call.op is _CONV3D:
            return self.fused_conv3d(call) or self.plain(call)
        if call.op is _CONV2D:
            return self.plain_conv(call) or self.plain(call)
        if call.op is _ADD_RELU and all(i not in self.known for i in call.reads):
            return self.add_relu(call)
        return self.plain(call)

    def plain(self, call: Call) -> Plain:
        reads = tuple(dict.fromkeys(call.reads))
        return Plain(
            str(call.op).removesuffix(".default"),
            call,
            tuple(i for i in reads if i not in self.known),
            tuple(i for i in reads if i in self.known),
        )

    def name(self, weight: int) -> str:
        return self.names.get(weight, "convolution").removesuffix(".weight")

    def fused_conv(self, call: Call) -> Conv | None:
        x, weight, scale, shift, *rest = call.args
        residual = rest.pop(0) if call.op is _CONV else None
        vectors = (weight.id, scale.id, shift.id)
        values = (x.id, *((residual.id,) if residual is not None else ()))
        if any(i not in self.known for i in vectors) or any(i in self.known for i in values):
            return None
        stride, padding, dilation, groups, *rest = rest
        pool = None
        epilogue = "relu"
        if call.op is _STEM:
            kernel, step, pad = rest
            pool = MaxPool(_pair(kernel), _pair(step), _pair(pad))
        else:
            (epilogue,) = rest
        problem = self.problem(x.id, weight.id, stride, padding, dilation, groups, epilogue, pool)
        op = "conv_affine_act" if pool is None else "conv_affine_relu_maxpool"
        return Conv(
            self.name(weight.id), op, problem, call.result, x.id, *vectors,
            None if residual is None else residual.id,
        )  # fmt: skip

    def fused_conv3d(self, call: Call) -> Conv3d | None:
        x, weight, scale, shift, residual, *window, groups, epilogue = call.args
        vectors = (weight.id, scale.id, shift.id)
        values = (x.id, *(() if residual is None else (residual.id,)))
        if any(i not in self.known for i in vectors) or any(i in self.known for i in values):
            return None
        meta, shape = self.graph.meta[x.id], self.graph.meta[weight.id].shape
        n, c, *size = meta.shape
        k, _, *kernel = shape
        stride, padding, dilation = map(_triple, window)
        problem = Conv3dProblem(
            n, c, _triple(size), k, _triple(kernel), stride, padding, dilation, groups, epilogue,
            meta.dtype,
        )  # fmt: skip
        return Conv3d(
            self.name(weight.id), "conv3d_affine_act", problem, call.result, x.id, *vectors,
            None if residual is None else residual.id,
        )  # fmt: skip

    def plain_conv(self, call: Call) -> Conv | None:
        defaults = (None, [1, 1], [0, 0], [1, 1], 1)
        x, weight, *rest = call.args
        given: list[Any] = [*rest, *defaults[len(rest) :]]
        bias, stride, padding, dilation, groups = given
        meta = self.graph.meta[x.id]
        constants = [weight.id, *([] if bias is None else [bias.id])]
        if (
            call.kwargs
            or len(meta.shape) != 4
            or 0 in meta.shape
            or meta.dtype not in DTYPES
            or x.id in self.known
            or any(i not in self.known for i in constants)
        ):
            return None
        problem = self.problem(x.id, weight.id, stride, padding, dilation, groups, "none", None)
        wide = torch.float64 if meta.dtype == torch.float64 else torch.float32
        scale = self.literal(torch.ones(problem.k, dtype=wide, device=meta.device))
        if bias is None:
            shift = self.literal(torch.zeros(problem.k, dtype=wide, device=meta.device))
        else:
            shift = self.converted(bias.id, wide)
        return Conv(
            self.name(weight.id), "conv_affine_act", problem, call.result, x.id, weight.id, scale,
            shift,
        )  # fmt: skip

    def add_relu(self, call: Call) -> AddRelu:
        a, b = (self.graph.meta[i] for i in call.reads)
        alike = a.channels_last == b.channels_last
        problem = AddReluProblem(a.shape, a.dtype, False, alike)
        return AddRelu("add_relu", "add_relu", problem, call.result, *call.reads)

    def problem(
        self,
        x: int,
        weight: int,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        epilogue: str,
        pool: MaxPool | None,
    ) -> ConvProblem:
        meta, shape = self.graph.meta[x], self.graph.meta[weight].shape
        n, c, h, w = meta.shape
        return ConvProblem(
            n, c, h, w, shape[0], shape[2], shape[3],
            _pair(stride), _pair(padding), _pair(dilation), groups, epilogue,
            meta.dtype, meta.channels_last, pool,
        )  # fmt: skip

    def literal(self, tensor: Tensor) -> int:
        number, self.next = self.next, self.next + 1
        self.graph.origins[number] = Literal(tensor)
        self.known.add(number)
        return number

    def converted(self, value: int, dtype: torch.dtype) -> int:
        if self.graph.meta[value].dtype == dtype:
            return value
        number, self.next = self.next, self.next + 1
        self.constant.append(Call(torch.ops.aten.to.dtype, (Ref(value), dtype), {}, number))
        self.known.add(number)
        return number


def _pair(value: Any) -> tuple[int, int]:
    values = [int(v) for v in value]
    return (values[0], values[-1])


def _triple(value: Any) -> tuple[int, int, int]:
    depth, height, width = map(int, value)
    return depth, height, width


__all__ = [
    "AddRelu",
    "Chained",
    "Conv",
    "Conv3d",
    "Layer",
    "Layers",
    "Plain",
    "Span",
    "Tunable",
    "lower",
]
