"""From a model and an example to a flat list of calls, specialised to the example's shapes.

The model is traced with fake tensors (``make_fx``), below its modules and above autograd: what is
left are the fused ops and those of ATen. Code that looks at the values of tensors cannot be traced
that way, nor can code that changes the model; both are refused, so that a graph is what the model
does for every input of these shapes.

Tensors of the model become constants with an origin: the name of a parameter or buffer, the recipe
of a folded scale or shift, or a literal. A graph can so be given other weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fused_resnet import fold, tracing
from fused_resnet.fold import Recipe
from fused_resnet.problem import channels_last_format
from fused_resnet.tracing import Untraceable


@dataclass(frozen=True)
class Ref:
    """A value within the arguments of a call."""

    id: int


@dataclass(frozen=True)
class Named:
    """Origin of a constant: the parameter or buffer of that name in the state_dict."""

    name: str


@dataclass(frozen=True, eq=False)
class Literal:
    """Origin of a constant: a tensor that belongs to no module."""

    tensor: Tensor


Origin = Named | Recipe | Literal


@dataclass(frozen=True)
class Meta:
    """What is known of a tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @staticmethod
    def of(t: Tensor) -> Meta:
        """That of a tensor, fake or real."""
        last = t.dim() in (4, 5) and t.is_contiguous(memory_format=channels_last_format(t))
        return Meta(tuple(t.shape), t.dtype, t.device, last)

    def empty(self) -> Tensor:
        """A tensor like that."""
        t = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return t.contiguous(memory_format=channels_last_format(t)) if self.channels_last else t

    def noise(self) -> Tensor:
        """A tensor like that, the same each time: of normal distribution, or 0 if of integers."""
        t = self.empty()
        if not t.is_floating_point():
            return t
        return t.normal_(generator=torch.Generator(self.device).manual_seed(0))

    @property
    def bytes(self) -> int:
        """Its size, dense."""
        count = self.dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Call:
    """One operation.

    Attributes:
        op: an operator of torch, or ``operator.getitem`` of a result that is a tuple.
        args: plain values and `Ref`, in lists and tuples too.
        kwargs: likewise.
        result: the value that it makes.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int

    @property
    def reads(self) -> tuple[int, ...]:
        """Values that it reads, in order."""
        return tuple(refs_in((self.args, self.kwargs)))


@dataclass
class Graph:
    """A model at one set of shapes.

    Attributes:
        inputs: values that the tensors among the arguments become, in the order of the leaves.
        calls: in the order of execution.
        outputs: what is returned: `Ref` or a plain value for each leaf of ``structure``.
        structure: of the returned value.
        origins: constants and where they come from.
        meta: of every value that is a tensor.
    """

    inputs: tuple[int, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Any, ...]
    structure: pytree.TreeSpec
    origins: dict[int, Origin] = field(default_factory=dict)
    meta: dict[int, Meta] = field(default_factory=dict)

    def names(self) -> dict[int, str]:
        """For constants that are a parameter or buffer: its name."""
        return {i: o.name for i, o in self.origins.items() if isinstance(o, Named)}

    def fresh(self) -> int:
        """A number that is no value yet."""
        results = (c.result for c in self.calls)
        return max((*self.inputs, *self.origins, *self.meta, *results), default=-1) + 1


def refs_in(arguments: Any) -> Iterator[int]:
    """Values that occur in arguments."""
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, Ref):
            yield leaf.id


def substitute(arguments: Any, value: Callable[[int], Any]) -> Any:
    """The arguments with each `Ref` replaced by ``value`` of its number."""
    return pytree.tree_map(lambda a: value(a.id) if isinstance(a, Ref) else a, arguments)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Callable[..., Any] | None = None,
) -> Graph:
    """Trace ``model``, which was fused and has run once since its parameters last changed.

    Args:
        model: in eval mode.
        args: of its forward; tensors among them become the graph's inputs.
        kwargs: likewise.
        run: what is traced in the place of ``model`` itself; it calls the model.

    Raises:
        Untraceable: what the model does cannot be written down as a graph; the message says why.
    """
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise Untraceable(f"a hook is registered on {path or 'the model'}")
    run = model if run is None else run
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    returned: list[pytree.TreeSpec] = []

    def flat(*tensors: Tensor) -> list[Any]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        inner, keywords = pytree.tree_unflatten(filled, structure)
        out, spec = pytree.tree_flatten(run(*inner, **keywords))
        returned.append(spec)
        for leaf in out:
            if not isinstance(leaf, Tensor | bool | int | float | str | None):
                raise Untraceable(f"it returns a {type(leaf).__name__}")
        return out

    trace = make_fx(flat, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), tracing.unchanged(model):
            module = trace(*(leaves[i] for i in places))
    except Untraceable:
        raise
    except Exception as e:  # Whatever the model's own code makes of fake tensors.
        raise Untraceable(tracing.reason_of(e)) from e
    return _cleaned(_read(module, model, returned[-1]))


# --------------------------------------------------------------------------------------------------
# From the nodes of torch.fx to calls.
# --------------------------------------------------------------------------------------------------


def _read(module: fx.GraphModule, model: nn.Module, structure: pytree.TreeSpec) -> Graph:
    recipes = fold.recipes(model)
    names = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}
    ids: dict[fx.Node, int] = {}
    constants: dict[int, int] = {}  # By the identity of the tensor.
    graph = Graph((), (), (), structure)
    calls: list[Call] = []
    inputs: list[int] = []

    def argument(a: Any) -> Any:
        as_ref: Callable[[fx.Node], Any] = lambda node: Ref(ids[node])  # noqa: E731
        return fx.map_arg(a, as_ref)

    for node in module.graph.nodes:
        number = len(ids)
        value = node.meta.get("val")
        if node.op == "placeholder":
            inputs.append(number)
        elif node.op == "get_attr":
            tensor = getattr(module, str(node.target))
            if not isinstance(tensor, Tensor):
                raise Untraceable(f"it refers to a {type(tensor).__name__}")
            number = constants.setdefault(id(tensor), number)
            value = tensor
            name = names.get(id(tensor))
            literal = Literal(tensor.detach().clone()) if number not in graph.origins else None
            origin: Origin | None = recipes.get(id(tensor)) or literal
            if name is not None:
                origin = Named(name)
            if origin is not None:
                graph.origins.setdefault(number, origin)
        elif node.op == "call_function":
            if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
                raise Untraceable(f"it calls {getattr(node.target, '__name__', node.target)}")
            calls.append(
                Call(node.target, argument(node.args), dict(argument(node.kwargs)), number)
            )
        elif node.op == "output":
            leaves = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
            graph.outputs = tuple(argument(leaf) for leaf in leaves)
        ids[node] = number
        if isinstance(value, Tensor):
            graph.meta[number] = Meta.of(value)
    return replace(graph, inputs=tuple(inputs), calls=tuple(calls))


def _cleaned(graph: Graph) -> Graph:
    """Without calls that do nothing or that nobody reads, and with fewer writes in place."""
    graph = _functional(graph)
    graph = _without_aliases(graph)
    _refuse_writes(graph)
    live = set(refs_in(graph.outputs))
    kept: list[Call] = []
    for call in reversed(graph.calls):
        if call.result in live or _writes(call):
            kept.append(call)
            live.update(call.reads)
    return replace(
        graph,
        calls=tuple(reversed(kept)),
        origins={i: o for i, o in graph.origins.items() if i in live},
        meta={i: m for i, m in graph.meta.items() if i in live or i in graph.inputs},
    )


def _writes(call: Call) -> bool:
    return isinstance(call.op, OpOverload) and bool(call.op._schema.is_mutable)


def _written(call: Call) -> list[int]:
    """Values that a call writes to."""
    if not _writes(call):
        return []
    found: list[int] = []
    for i, formal in enumerate(call.op._schema.arguments):
        if formal.alias_info is not None and formal.alias_info.is_write:
            actual = call.args[i] if i < len(call.args) else call.kwargs.get(formal.name)
            found += refs_in(actual)
    return found


def _is_view(call: Call) -> bool:
    """Whether the result may share memory with an argument."""
    if call.op is operator.getitem:
        return True
    # Composite operators such as flatten and reshape say nothing of what they may return.
    return call.op.namespace != "fused_resnet" and (
        any(r.alias_info is not None for r in call.op._schema.returns)
        or call.op._schema.name in _MAY_ALIAS
    )


_MAY_ALIAS = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias", "contiguous", "dropout", "feature_dropout", "flatten", "reshape", "to",
        "type_as",
    )
)  # fmt: skip

_ADD_RELU = torch.ops.fused_resnet.add_relu.default
_ADD_RELU_INPLACE = torch.ops.fused_resnet.add_relu_.default


def _functional(graph: Graph) -> Graph:
    """``add_relu_`` as ``add_relu``, where nobody could tell the difference."""
    made = {c.result: c for c in graph.calls}
    viewed = {i for c in graph.calls if _is_view(c) for i in c.reads}
    renamed: dict[int, int] = {}
    calls = []
    next_id = graph.fresh()
    for call in graph.calls:
        moved = replace(
            call,
            args=substitute(call.args, lambda i: Ref(renamed.get(i, i))),
            kwargs=substitute(call.kwargs, lambda i: Ref(renamed.get(i, i))),
        )
        if call.op is _ADD_RELU_INPLACE:
            a = call.args[0].id
            maker = made.get(a)
            if maker is not None and not _is_view(maker) and a not in viewed:
                graph.meta[next_id] = graph.meta[a]
                renamed[a] = next_id
                moved = replace(moved, op=_ADD_RELU, result=next_id)
                next_id += 1
        calls.append(moved)
    outputs = substitute(graph.outputs, lambda i: Ref(renamed.get(i, i)))
    return replace(graph, calls=tuple(calls), outputs=outputs)


def _without_aliases(graph: Graph) -> Graph:
    """Without calls that return their argument as it is."""
    same: dict[int, int] = {}
    calls = []
    for call in graph.calls:
        moved = replace(
            call,
            args=substitute(call.args, lambda i: Ref(same.get(i, i))),
            kwargs=substitute(call.kwargs, lambda i: Ref(same.get(i, i))),
        )
        if _returns_its_argument(moved, graph.meta):
            same[call.result] = moved.args[0].id
        else:
            calls.append(moved)
    outputs = substitute(graph.outputs, lambda i: Ref(same.get(i, i)))
    return replace(graph, calls=tuple(calls), outputs=outputs)


def _returns_its_argument(call: Call, meta: Mapping[int, Meta]) -> bool:
    aten = torch.ops.aten
    if call.op in (aten.dropout.default, aten.feature_dropout.default):
        return call.args[2] is False
    if call.op in (aten.alias.default, aten.detach.default, aten.lift_fresh.default):
        return True
    if call.op is aten.to.dtype:
        return (
            len(call.args) == 2 and not call.kwargs and meta[call.args[0].id].dtype == call.args[1]
        )
    return False


def _refuse_writes(graph: Graph) -> None:
    """Raise for a graph that changes what is not its own."""
    root: dict[int, int] = {}
    for call in graph.calls:
        if _is_view(call) and call.reads:
            root[call.result] = root.get(call.reads[0], call.reads[0])
        for i in _written(call):
            owner = root.get(i, i)
            if owner in graph.inputs:
                raise Untraceable(f"it writes to its argument ({call.op})")
            origin = graph.origins.get(owner)
            if origin is not None:
                name = origin.name if isinstance(origin, Named) else "a constant"
                raise Untraceable(f"it writes to {name} ({call.op})")


def rewritten(graph: Graph) -> set[int]:
    """Values in whose memory some call writes: what they are depends on when they are read."""
    root: dict[int, int] = {}
    found: set[int] = set()
    for call in graph.calls:
        if _is_view(call) and call.reads:
            root[call.result] = root.get(call.reads[0], call.reads[0])
        found.update(root.get(i, i) for i in _written(call))
    return found | {i for i, owner in root.items() if owner in found}


# --------------------------------------------------------------------------------------------------
# Constants.
# --------------------------------------------------------------------------------------------------

_RANDOM = torch.Tag.nondeterministic_seeded


def constant_calls(graph: Graph) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """The calls that depend on nothing but constants, and all others."""
    known = set(graph.origins)
    constant: list[Call] = []
    other: list[Call] = []
    written = {i for call in graph.calls for i in _written(call)}
    for call in graph.calls:
        random = isinstance(call.op, OpOverload) and _RANDOM in call.op.tags
        if (
            call.reads
            and not random
            and not _writes(call)
            and call.result not in written
            and all(i in known for i in call.reads)
        ):
            known.add(call.result)
            constant.append(call)
        else:
            other.append(call)
    return tuple(constant), tuple(other)


class Constants(Mapping[int, Tensor]):
    """The values of a graph's constants, each made when it is first asked for.

    Those that have a name come from ``state`` every time: if it reads them from a file, no more of
    them are in memory than somebody holds.

    Args:
        graph: whose constants they are.
        constant: its constant calls, see `constant_calls`.
        state: parameters and buffers by name.
        needed: values that are asked for.
    """

    def __init__(
        self,
        graph: Graph,
        constant: tuple[Call, ...],
        state: Mapping[str, Tensor],
        needed: set[int],
    ) -> None:
        self._graph = graph
        self._calls = {call.result: call for call in constant}
        self._state = state
        self._needed = needed
        self._made: dict[int, Any] = {}

    def __getitem__(self, i: int) -> Tensor:
        if i not in self._needed:
            raise KeyError(i)
        with torch.inference_mode(False), torch.no_grad():
            value: Tensor = self._value(i)
        return value

    def __contains__(self, i: object) -> bool:
        return i in self._needed

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._needed))

    def __len__(self) -> int:
        return len(self._needed)

    def _value(self, i: int) -> Any:
        origin = self._graph.origins.get(i)
        if isinstance(origin, Named):
            return self._state[origin.name].detach()
        if i not in self._made:
            if isinstance(origin, Recipe):
                self._made[i] = origin.cook(self._state)
            elif isinstance(origin, Literal):
                self._made[i] = origin.tensor
            else:
                call = self._calls[i]
                args, kwargs = substitute((call.args, call.kwargs), self._value)
                self._made[i] = call.op(*args, **kwargs)
        return self._made[i]


__all__ = [
    "Call",
    "Constants",
    "Graph",
    "Literal",
    "Meta",
    "Named",
    "Origin",
    "Ref",
    "capture",
    "constant_calls",
    "rewritten",
    "substitute",
]
