"""Proving: every layer of a network with its own weights and its real input, against float64.

Problems are measured once each, on the first layer that has them. Whether a kernel is right for the
other layers, whose weights differ, is seen here: the network is run layer by layer, and each kernel
that a plan may use computes the layer beside float64 and stock torch. Errors are taken from the
first and the last image of the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet import backends, ops
from fused_resnet.backends.kernel import Kernel
from fused_resnet.graph import Constants, Graph, Literal, refs_in, substitute
from fused_resnet.layers import Chained, Conv, Conv3d, Layers, Plain, Tunable
from fused_resnet.numerics import Error
from fused_resnet.problem import AddReluProblem, ChainProblem, channels_last_format
from fused_resnet.program import last_reads
from fused_resnet.stock import errors_of as distances
from fused_resnet.tuned_table import key_of
from fused_resnet.tuning import (
    Results,
    Task,
    call_of,
    error_of_stock,
    reference,
    results_of,
)

#: Called with a layer that kernels compete for and its task; returns the layer's results.
Visit = Callable[[Tunable, Task], Results]


def walk(
    layers: Layers,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    visit: Visit,
    wanted: Mapping[int, Sequence[int]] | None = None,
    seen: Callable[[int, dict[int, Tensor]], None] | None = None,
) -> list[Any]:
    """Run the layers one after another, each value let go when nobody reads it any more.

    Args:
        layers: what is run.
        state: parameters and buffers by name.
        inputs: of the graph.
        visit: computes the layers that kernels compete for.
        wanted: for the results of some layers, values that were made before them.
        seen: told of such a result, before it is made, and of the values wanted.

    Returns:
        What the graph returns, as leaves.
    """
    graph = layers.graph
    made = {*graph.inputs, *(i for layer in layers.layers for i in layer.results)}
    needed = {i for layer in layers.layers for i in layer.constants}
    needed |= set(refs_in(graph.outputs)) - made
    constants = Constants(graph, layers.constant, state, needed)
    env: dict[int, Any] = dict(zip(graph.inputs, inputs, strict=True))
    last = last_reads(layers)
    wanted = wanted or {}
    for position, layer in enumerate(layers.layers):
        for i in wanted.get(layer.result, ()):
            last[i] = max(last.get(i, position), position)

    def value(i: int) -> Any:
        return constants[i] if i in constants else env[i]

    with torch.inference_mode(False), torch.no_grad():
        for position, layer in enumerate(layers.layers):
            if layer.result in wanted and seen is not None:
                seen(layer.result, {i: value(i) for i in wanted[layer.result]})
            if isinstance(layer, Plain):
                args, kwargs = substitute((layer.call.args, layer.call.kwargs), value)
                env[layer.result] = layer.call.op(*args, **kwargs)
            else:
                # A chained call returns the next activation even where there is none.
                env.update(zip(layer.results, visit(layer, _task(layer, value)), strict=False))
            for i in {*layer.reads, *layer.results, *wanted.get(layer.result, ())}:
                if last.get(i, position) == position:
                    env.pop(i, None)
    results: list[Any] = substitute(list(graph.outputs), value)
    return results


def _task(layer: Tunable, value: Callable[[int], Tensor]) -> Task:
    args = [None if i is None else value(i) for i in layer.operands]
    if isinstance(layer, Conv | Conv3d) and (residual := args[4]) is not None:
        args[4] = residual.contiguous(memory_format=channels_last_format(residual))
    assert args[0] is not None
    return Task(layer.op, layer.problem, args[0].device, tuple(args))


def stock_result(layer: Tunable, task: Task) -> Results:
    """The layer's results by stock torch, laid out as the registered op promises."""
    return laid_out(layer, stock_kernel(task.op).run(task.problem, *task.args))


def laid_out(layer: Tunable, returned: Any) -> Results:
    """What a kernel returned, in the layout that the registered op promises."""
    results = results_of(returned)
    convolved = isinstance(layer, Conv | Conv3d | Chained)
    return tuple(map(ops.channels_last, results)) if convolved else results


def stock_kernel(op: str) -> Kernel:
    """Stock torch's kernel of an op."""
    return next(k for k in backends.KERNELS if k.op == op and k.backend == "torch")


def errors_of(
    layer: Tunable, task: Task, kernels: Sequence[Kernel]
) -> tuple[dict[Kernel, tuple[Error, ...] | str], tuple[Error, ...], Results | None]:
    """How far each kernel is off on a layer.

    Returns:
        For each kernel the errors of its results, or why there are none; stock torch's errors; and
        the results of the first kernel that gave some.
    """
    ends = _ends(task)
    exact = reference(ends)
    allowed = error_of_stock(ends, exact)
    found: dict[Kernel, tuple[Error, ...] | str] = {}
    first: Results | None = None
    for kernel in kernels:
        try:
            results = laid_out(layer, call_of(kernel, task)())
            found[kernel] = distances(tuple(_ends_of(r, task) for r in results), exact)
        except Exception as e:  # A kernel of any kind: what it raises makes it lose, no more.
            found[kernel] = f"it raised {type(e).__name__}: {e}"
            continue
        if first is None:
            first = results
    return found, allowed, first


def _ends(task: Task) -> Task:
    """The task for the first and the last image only."""
    if isinstance(task.problem, AddReluProblem) or task.problem.n <= 2:
        return task
    batched = (0, 1) if isinstance(task.problem, ChainProblem) else (0, 4)
    args = tuple(
        _ends_of(a, task) if i in batched and a is not None else a for i, a in enumerate(task.args)
    )
    return Task(task.op, task.problem, task.device, args)


def _ends_of(t: Tensor, task: Task) -> Tensor:
    if isinstance(task.problem, AddReluProblem) or task.problem.n <= 2:
        return t
    ends = torch.cat((t[:1], t[-1:]))
    return ends.contiguous(memory_format=channels_last_format(ends))


def digest(
    layers: Layers,
    kernels: Mapping[int, Kernel],
    state: Mapping[str, Tensor],
    *rule: object,
) -> str:
    """A number that changes with the layers, the kernels, the weights or the rule for kernels."""
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(json.dumps(["v1", *rule]).encode())
    for layer in layers.layers:
        if isinstance(layer, Plain):
            hashed.update(f"{layer.name} {layer.call.args} {layer.call.kwargs}".encode())
        else:
            key = key_of(layer.op, layer.problem)
            name = kernels[layer.result].full_name
            hashed.update(f"{key} {name} {layer.operands}".encode())
    for tensor in _sources(layers.graph, state):
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        hashed.update(raw.cpu().numpy().data)
    return hashed.hexdigest()


def _sources(graph: Graph, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that the graph's constants come from, each once."""
    found: dict[str, Tensor] = {}
    literals = []
    for origin in graph.origins.values():
        if isinstance(origin, Literal):
            literals.append(origin.tensor)
        else:
            names = getattr(origin, "names", None) or (origin.name,)  # type: ignore[union-attr]
            found.update((name, state[name]) for name in names)
    return [found[name] for name in sorted(found)] + literals


def tunable(layers: Layers) -> list[Tunable]:
    """The layers that kernels compete for, in order."""
    return [layer for layer in layers.layers if not isinstance(layer, Plain)]


__all__ = ["digest", "errors_of", "laid_out", "stock_kernel", "stock_result", "tunable", "walk"]
