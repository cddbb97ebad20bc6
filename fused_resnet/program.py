"""Layers with their chosen kernels, made ready to run: weights packed, lifetimes known.

A program is a list of steps over an environment of values. Maximal runs of layers that the native
program knows are one step, which is one call into C++; every other layer is a step of its own.
A value is let go after the step that reads it last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_resnet import native, ops
from fused_resnet.backends.cpu import SMALL_IMAGE
from fused_resnet.backends.cpu_program import CpuProgram
from fused_resnet.backends.cpu_program import Step as NativeStep
from fused_resnet.backends.kernel import Kernel, PackedKernel
from fused_resnet.graph import Constants, Meta, refs_in, substitute
from fused_resnet.layers import AddRelu, Chained, Conv, Conv3d, Layer, Layers, Plain, lower
from fused_resnet.problem import channels_last_format
from fused_resnet.weights import Weights

#: The kernel of each layer that has one, by the layer's result.
Kernels = Mapping[int, Kernel]

#: What a step does: read the environment, and write its results there.
Action = Callable[[list[Any]], None]


@dataclass
class Step:
    """One step of a program.

    Attributes:
        action: what it does.
        layers: results of the layers that it computes.
        frees: slots of values that nobody reads after it.
        inside: results among these that lie in the arena of a native program.
    """

    action: Action
    layers: tuple[int, ...]
    frees: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()


@dataclass
class Memory:
    """Bytes that a program needs, and that stock torch needs for the same.

    Attributes:
        arena: of the native steps, for their activations.
        activations: of other steps, at their peak.
        stock_activations: of stock torch at its peak, activation and sum in place; with oneDNN's
            copy of a convolution's weight in its own order, made at every call.
    """

    arena: int
    activations: int
    stock_activations: int


class Program:
    """See the module. Calling it is safe from several threads at once.

    Args:
        layers: what is computed.
        kernels: by which kernels.
        weights: on which weights.
        join: whether native layers in a row become one call.
    """

    def __init__(
        self, layers: Layers, kernels: Kernels, weights: Weights, join: bool = True
    ) -> None:
        self.layers = layers
        self.kernels = dict(kernels)
        graph = layers.graph
        needed = {i for layer in layers.layers for i in layer.constants}
        made = {*graph.inputs, *(i for layer in layers.layers for i in layer.results)}
        needed |= set(refs_in(graph.outputs)) - made
        constants = Constants(graph, layers.constant, weights.state, needed)
        builder = _Builder(layers, self.kernels, weights, constants, join)
        self.join = join
        self.steps = builder.steps()
        self.native = builder.programs
        self._slots = builder.slots
        self._template = builder.template()
        self._inputs = [builder.slots[i] for i in graph.inputs]
        self._outputs = substitute(list(graph.outputs), lambda i: _Slot(builder.slots[i]))

    def __call__(self, *tensors: Tensor) -> Any:
        """The model's result for tensors of the shapes that the program was made for."""
        env = list(self._template)
        for slot, tensor in zip(self._inputs, tensors, strict=True):
            env[slot] = tensor
        for step in self.steps:
            step.action(env)
            for slot in step.frees:
                env[slot] = None
        leaves = [env[o.index] if type(o) is _Slot else o for o in self._outputs]
        return pytree.tree_unflatten(leaves, self.layers.graph.structure)

    @property
    def memory(self) -> Memory:
        """Bytes needed; counted from the lifetimes of values, not measured."""
        inside = {i for step in self.steps for i in step.inside}
        arena = sum(n.arena_bytes for n in self.native)
        return Memory(
            arena,
            _peak(self.layers, lambda layer: 0 if layer.result in inside else 1),
            _peak(lower(self.layers.source) if self.layers.spans else self.layers, _stock_copies),
        )


@dataclass(frozen=True)
class _Slot:
    index: int


def _stock_copies(layer: Layer) -> int:
    """Results that stock torch holds at once while it computes a layer."""
    # The convolution's own result, and that of its batch norm; pooling comes on top.
    return 2 if isinstance(layer, Conv | Conv3d) else 1


def _peak(layers: Layers, copies: Callable[[Layer], int]) -> int:
    """The largest sum of sizes of the values that live at once."""
    meta = layers.graph.meta
    last = last_reads(layers)
    live = 0
    peak = 0
    size: dict[int, int] = {}
    for position, layer in enumerate(layers.layers):
        count = copies(layer)
        sizes = {i: meta[i].bytes if i in meta and count else 0 for i in layer.results}
        own = sum(sizes.values())
        most = own * count
        if isinstance(layer, Conv) and count > 1:
            p = layer.problem
            made = own if p.pool is None else p.n * p.k * math.prod(p.conv_size) * p.dtype.itemsize
            pooling = 0 if p.pool is None else made + own
            most = max(2 * made, made + _reordered(layer, meta[layer.result]), pooling)
        size.update(sizes)
        peak = max(peak, live + most)
        live += own
        for value in {*layer.reads, *layer.results}:
            if last.get(value, position) == position:
                live -= size.pop(value, 0)
    return peak


def _reordered(layer: Conv, result: Meta) -> int:
    """Bytes of the weight in oneDNN's order: measured, 9.5 MB above what a 512 -> 512 3x3 holds.

    None for one small image, for which ATen may leave oneDNN aside.
    """
    p = layer.problem
    small = p.n == 1 and p.c * p.h * p.w <= SMALL_IMAGE
    if small or result.device.type != "cpu" or p.dtype not in (torch.float32, torch.bfloat16):
        return 0
    return math.prod(p.weight_shape) * p.dtype.itemsize


def last_reads(layers: Layers) -> dict[int, int]:
    """For each value the position of the layer that reads it last; outputs are read by the end."""
    last: dict[int, int] = {}
    for position, layer in enumerate(layers.layers):
        last.update(dict.fromkeys(layer.reads, position))
    last.update(dict.fromkeys(refs_in(layers.graph.outputs), len(layers.layers)))
    return last


@dataclass
class _Builder:
    layers: Layers
    kernels: Kernels
    weights: Weights
    constants: Mapping[int, Tensor]
    join: bool
    slots: dict[int, int] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)
    programs: list[CpuProgram] = field(default_factory=list)

    def slot(self, value: int) -> int:
        return self.slots.setdefault(value, len(self.slots))

    def hold(self, value: int) -> Tensor:
        """A constant that stays in the environment."""
        if value not in self.held:
            self.held[value] = self.weights.own(self.layers.graph, value, self.constants)
        return self.held[value]

    def template(self) -> list[Any]:
        env: list[Any] = [None] * len(self.slots)
        for value, tensor in self.held.items():
            env[self.slot(value)] = tensor
        return env

    def steps(self) -> list[Step]:
        graph = self.layers.graph
        for value in graph.inputs:
            self.slot(value)
        for value in refs_in(graph.outputs):
            if value in self.constants:
                self.hold(value)
            self.slot(value)
        found: list[Step] = []
        run: list[tuple[Layer, list[NativeStep]]] = []
        segments = native.Segments(self.layers, self.kernels, self.weights, self.constants)
        for layer in self.layers.layers:
            steps = segments.steps(layer) if self.join else None
            if steps is not None:
                run.append((layer, steps))
                continue
            found += self.native_step(run)
            run = []
            found.append(Step(self.action(layer), (layer.result,)))
        found += self.native_step(run)
        for value in self.held:
            self.slot(value)
        self.set_frees(found)
        return found

    def set_frees(self, steps: list[Step]) -> None:
        by_result = {layer.result: layer for layer in self.layers.layers}
        kept = {*refs_in(self.layers.graph.outputs), *self.constants}
        seen: set[int] = set(kept)
        for step in reversed(steps):
            computed = [by_result[r] for r in step.layers]
            touched = {i for layer in computed for i in (*layer.reads, *layer.results)}
            new = [i for i in touched if i not in seen and i in self.slots]
            step.frees = tuple(self.slots[i] for i in new)
            seen.update(new)

    # ---------------------------------------------------------------------------- native programs

    def native_step(self, run: list[tuple[Layer, list[NativeStep]]]) -> list[Step]:
        """One step for layers in a row; or a step for each, where that is no worse."""
        steps = [step for _, found in run for step in found]
        if not native.is_worth_it(steps):
            return [Step(self.action(layer), (layer.result,)) for layer, _ in run]
        made = [layer.result for layer, _ in run]
        read = dict.fromkeys(i for layer, _ in run for i in layer.reads)
        inputs = [i for i in read if i not in made]
        outside = {
            i for other in self.layers.layers if other.result not in made for i in other.reads
        }
        outside.update(refs_in(self.layers.graph.outputs))
        outputs = [i for i in made if i in outside]
        program = native.program(steps, self.layers.graph, inputs, outputs)
        self.programs.append(program)
        sources = [self.slot(i) for i in inputs]
        targets = [self.slot(i) for i in outputs]

        def action(env: list[Any]) -> None:
            results = program(*[env[s] for s in sources])
            for target, result in zip(targets, results, strict=True):
                env[target] = result

        return [Step(action, tuple(made), inside=tuple(i for i in made if i not in outputs))]

    # --------------------------------------------------------------------------------- other layers

    def action(self, layer: Layer) -> Action:
        if isinstance(layer, Conv | Conv3d):
            return self.conv_action(layer)
        if isinstance(layer, AddRelu):
            return self.add_action(layer)
        if isinstance(layer, Chained):
            return self.chain_action(layer)
        return self.plain_action(layer)

    def conv_action(self, layer: Conv | Conv3d) -> Action:
        kernel, problem = self.kernels[layer.result], layer.problem
        graph = self.layers.graph
        scale, shift = (
            self.weights.own(graph, i, self.constants) for i in (layer.scale, layer.shift)
        )
        first: Any
        if isinstance(kernel, PackedKernel):
            first = self.weights.packed(kernel, layer, graph, self.constants)
        else:
            first = self.weights.own(graph, layer.weight, self.constants)
        x, target = self.slot(layer.x), self.slot(layer.result)
        residual = None if layer.residual is None else self.slot(layer.residual)

        def action(env: list[Any]) -> None:
            r = None
            if residual is not None:
                r = env[residual]
                r = r.contiguous(memory_format=channels_last_format(r))
            env[target] = ops.channels_last(kernel.run(problem, env[x], first, scale, shift, r))

        return action

    def add_action(self, layer: AddRelu) -> Action:
        kernel, problem = self.kernels[layer.result], layer.problem
        a, b, target = self.slot(layer.a), self.slot(layer.b), self.slot(layer.result)

        def action(env: list[Any]) -> None:
            x, y = env[a], env[b]
            if x.stride() != y.stride():
                y = torch.empty_like(x).copy_(y)
            env[target] = kernel.run(problem, x, y)

        return action

    def chain_action(self, layer: Chained) -> Action:
        kernel, problem = self.kernels[layer.result], layer.problem
        weights = self.weights.of_chain(kernel, layer, self.layers.graph, self.constants)
        x, shortcut, target = map(self.slot, (layer.x, layer.shortcut, layer.result))
        following = None if layer.mid_next is None else self.slot(layer.mid_next)

        def action(env: list[Any]) -> None:
            out, mid_next = kernel.run(problem, env[x], env[shortcut], *weights)
            env[target] = ops.channels_last(out)
            if following is not None:
                env[following] = ops.channels_last(mid_next)

        return action

    def plain_action(self, layer: Plain) -> Action:
        call = layer.call
        for value in layer.constants:
            self.hold(value)
        args, kwargs = substitute((call.args, call.kwargs), lambda i: _Slot(self.slot(i)))
        flat, structure = pytree.tree_flatten((args, kwargs))
        target, op = self.slot(call.result), call.op
        if not kwargs and all(
            not isinstance(a, list | tuple | dict) or not _has_slot(a) for a in args
        ):
            # The usual case, without a tree to rebuild.
            places = [(i, a.index) for i, a in enumerate(args) if type(a) is _Slot]
            fixed = list(args)

            def quick(env: list[Any]) -> None:
                given = list(fixed)
                for i, s in places:
                    given[i] = env[s]
                env[target] = op(*given)

            return quick

        def action(env: list[Any]) -> None:
            leaves = [env[a.index] if type(a) is _Slot else a for a in flat]
            given, keywords = pytree.tree_unflatten(leaves, structure)
            env[target] = op(*given, **keywords)

        return action


def _has_slot(argument: Any) -> bool:
    return any(type(leaf) is _Slot for leaf in pytree.tree_leaves(argument))


__all__ = ["Kernels", "Memory", "Program", "Step", "last_reads"]
