"""One module's forward as a graph, or a clear reason why it cannot be one.

torch.fx calls ``forward`` once with proxies and records what happens to them. What it cannot see it
bakes in or drops without a word: default arguments, ``isinstance`` of an input, random numbers,
``no_grad``, values that forward keeps on the module. The tracer here either records such things,
states them as conditions under which the graph holds (`Trace.fixed`, `Trace.tensors`), or refuses
with `Untraceable`.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fused_resnet import hooks
from fused_resnet.fold import is_frozen_norm

#: Position of a call: its number within each frame (call of a module that was traced into) on the
#: way.
Key = tuple[int, ...]


class Untraceable(Exception):
    """The forward of a module does what a graph cannot express."""


class FusedModule:
    """Marks the classes that `fused_resnet.fuse` derives from a module's own class."""

    __slots__ = ()


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before it was fused."""
    cls = type(module)
    while issubclass(cls, FusedModule):
        cls = next(base for base in cls.__bases__ if issubclass(base, nn.Module))
    return cls


def is_leaf(module: nn.Module) -> bool:
    """Whether calls of ``module`` stand in a graph as they are, and no one looks inside."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    cls = stock_class(module)
    return (
        cls.__module__.split(".")[:2] in (["torch", "nn"], ["torch", "ao"], ["torch", "jit"])
        or cls.__module__.startswith("torch._dynamo")
        or isinstance(module, _ConvNd | _NormBase | torch.jit.ScriptModule)
        or is_frozen_norm(cls)
    )


@dataclass(frozen=True)
class Frame:
    """A call of a module whose forward was traced into.

    Attributes:
        path: of the module.
        module: the module.
        plain: whether it takes tensors or constants and returns one tensor; containers of tensors
            can only be traced through.
    """

    path: str
    module: nn.Module
    plain: bool


@dataclass
class Trace:
    """The graph of one module's forward, and the conditions under which it holds.

    Attributes:
        graph: placeholders are `inputs`, in order; each node that computes has its ``Key`` in
            ``node.meta["key"]``.
        frames: calls that were traced into, by position.
        opaque: why a call of a module that is no leaf was not traced into, by position.
        inputs: names of the arguments that the graph takes.
        fixed: arguments with defaults: the graph holds where they keep them.
        tensors: inputs that must be tensors, since forward asked.
        structure: of the returned value; the graph returns its leaves, or the value if this is
            None.
    """

    graph: fx.Graph
    frames: dict[Key, Frame] = field(default_factory=dict)
    opaque: dict[Key, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    fixed: dict[str, Any] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=set)
    structure: pytree.TreeSpec | None = None


def trace(module: nn.Module, inline: Callable[[Key], bool] = lambda key: True) -> Trace:
    """Trace ``module``; it is left exactly as it was.

    Args:
        module: whose forward is to become a graph.
        inline: whether the call at a position is traced into; others become one node.

    Raises:
        Untraceable: with the reason.
    """
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the instance")
    # torch.fx patches nn.Module while it traces, for all threads.
    with _lock, unchanged(module):
        tracer = _Tracer(inline)
        try:
            tracer.trace(module)
        except Untraceable:
            raise
        except Exception as e:
            raise Untraceable(reason_of(e)) from e
        finally:
            tracer.restore_globals()
    return tracer.result


def reason_of(e: Exception) -> str:
    """The first sentence of an error's message."""
    if isinstance(e, Untraceable):
        return str(e)
    message = re.split(r"\n|(?<=\w)\. ", str(e).strip(), maxsplit=1)[0]
    return f"{type(e).__name__}: {message}"


_lock = threading.RLock()

#: Functions that make a tensor of no tensor: recorded, since they must run anew at each call.
_FACTORIES = frozenset(
    {
        torch.arange,
        torch.bernoulli,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.normal,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.scalar_tensor,
        torch.tensor,
        torch.zeros,
    }
)

#: Leaves that return a tensor whenever they return at all.
_TENSOR_LEAVES = (
    _ConvNd,
    _NormBase,
    nn.ReLU,
    nn.Linear,
    nn.Dropout,
    nn.Identity,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
#: Operators that write to their first argument where it is a tensor.
INPLACE_OPERATORS = (
    operator.iadd,
    operator.iand,
    operator.ifloordiv,
    operator.ilshift,
    operator.imatmul,
    operator.imod,
    operator.imul,
    operator.ior,
    operator.ipow,
    operator.irshift,
    operator.isub,
    operator.itruediv,
    operator.ixor,
)
_TENSOR_FUNCTIONS = (torch.cat, torch.relu, nn.functional.relu, operator.add, operator.iadd)


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is; torch.fx takes it for ``x = x + y``."""


def _inplace(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    def method(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _inplace(_function))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inline: Callable[[Key], bool]) -> None:
        # Wrapping the functions of math, which torch.fx does by default, takes longer than most
        # traces.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self._inline = inline
        self._frame: Key = ()
        self._next = [0]
        self._globals: dict[int, tuple[dict[str, Any], Any]] = {}
        self._context = _context()
        self.result = Trace(fx.Graph())

    # --------------------------------------------------------------------- arguments and the result

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        result = self.result
        result.graph = self.graph
        args: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for name, p in list(inspect.signature(root_fn).parameters.items())[1:]:
            if p.kind is p.VAR_POSITIONAL and not result.inputs:
                raise Untraceable("it takes any number of arguments")
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                result.fixed[name] = () if p.kind is p.VAR_POSITIONAL else {}
            elif p.default is not p.empty:
                result.fixed[name] = p.default
            else:
                result.inputs.append(name)
                proxy = self.create_proxy("placeholder", name, (), {})
                if p.kind is p.KEYWORD_ONLY:
                    keywords[name] = proxy
                else:
                    args.append(proxy)

        def forward(*root: Any) -> Any:
            self._watch_globals(root_fn)
            with _RecordFactories(self):
                value = root_fn(*args, **keywords)
            if isinstance(value, fx.Proxy):
                return value
            leaves, result.structure = pytree.tree_flatten(value)
            for leaf in leaves:
                if not isinstance(leaf, fx.Proxy | bool | int | float | str | None):
                    raise Untraceable(f"it returns a {type(leaf).__name__}")
            return tuple(leaves)

        return forward, [self.root]

    # -------------------------------------------------------------------------- calls and positions

    def _position(self) -> Key:
        self._next[-1] += 1
        return (*self._frame, self._next[-1] - 1)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind not in ("placeholder", "get_attr", "output") and _context() != self._context:
            raise Untraceable("part of its forward runs under no_grad, inference_mode or autocast")
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method"):
            node.meta["key"] = self._position()
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:
            raise Untraceable(
                f"it calls a {type(m).__name__} that is not registered as a submodule"
            ) from None
        key = self._position()
        plain = _is_plain(args) and _is_plain(kwargs.values())
        if not is_leaf(m) and self._inline(key):
            last = next(iter(reversed(self.graph.nodes)), None)
            try:
                value = self._enter(m, key, args, kwargs)
                plain = plain and isinstance(value, fx.Proxy)
                self.result.frames[key] = Frame(path, m, plain)
                return value
            except Exception as e:
                self.result.opaque[key] = reason_of(e)
                self._forget_after(last, key)
        proxy = self.create_proxy("call_module", path, args, kwargs)
        proxy.node.meta["key"] = key
        return proxy

    def _enter(self, m: nn.Module, key: Key, args: Any, kwargs: Any) -> Any:
        """Run the forward of ``m`` within a frame of its own, without its hooks."""
        if hooks.is_on(m):
            raise Untraceable("a hook is registered on it, or its forward was replaced")
        outer, self._frame = self._frame, key
        self._next.append(0)
        try:
            function = stock_class(m).forward
            self._watch_globals(function)
            return function(m, *args, **kwargs)
        finally:
            self._frame = outer
            self._next.pop()

    def _forget_after(self, last: fx.Node | None, key: Key) -> None:
        """Erase the nodes after ``last`` and what is known of calls below ``key``."""
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)
        for calls in (self.result.frames, self.result.opaque):
            for other in [k for k in calls if k[: len(key)] == key and k != key]:
                del calls[other]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # No cache: a node that it holds may have been erased.
        return super().getattr(attr, attr_val, {})

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict | list) and type(a) not in (dict, list, *_IMMUTABLE):
            raise Untraceable(f"it passes a {type(a).__name__} on")
        known = (*self.root.parameters(), *self.root.buffers()) if isinstance(a, Tensor) else ()
        if isinstance(a, Tensor) and not any(a is b for b in known) and a not in self.tensor_attrs:
            raise Untraceable("it makes a tensor while it is traced")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    # ------------------------------------------------------------------------ isinstance of proxies

    def _watch_globals(self, function: Any) -> None:
        """Have calls of ``isinstance`` in the file of ``function`` answered by `_isinstance`."""
        scope = getattr(inspect.unwrap(function), "__globals__", None)
        if scope is None or id(scope) in self._globals or scope.get("__name__") == __name__:
            return
        self._globals[id(scope)] = (scope, scope.get("isinstance"))
        scope["isinstance"] = self._isinstance

    def restore_globals(self) -> None:
        for scope, before in self._globals.values():
            if before is None:
                del scope["isinstance"]
            else:
                scope["isinstance"] = before
        self._globals.clear()

    def _isinstance(self, value: Any, classes: Any) -> bool:
        if type(value) is not _Proxy or builtins.isinstance(value, classes):
            return builtins.isinstance(value, classes)
        node = value.node
        if node.op == "placeholder":
            self.result.tensors.add(str(node.target))
        elif node.op == "call_module":
            if not _returns_tensor(self.root.get_submodule(str(node.target))):
                raise Untraceable(f"it asks for the type of {node.name}")
        elif node.target not in _TENSOR_FUNCTIONS:
            raise Untraceable(f"it asks for the type of {node.name}")
        return issubclass(Tensor, classes)


def _returns_tensor(module: nn.Module) -> bool:
    """Whether ``module`` is known to return one tensor where it is given one."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return len(module) > 0 and all(map(_returns_tensor, module))
    if isinstance(module, nn.MaxPool2d):
        return not module.return_indices
    return isinstance(module, _TENSOR_LEAVES)


_IMMUTABLE = (fx.immutable_collections.immutable_list, fx.immutable_collections.immutable_dict)


def _is_plain(values: Any) -> bool:
    return all(not isinstance(v, list | tuple | dict | set) for v in values)


def _context() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


def _has_proxy(values: Any) -> bool:
    return any(
        isinstance(v, fx.Proxy)
        or (isinstance(v, list | tuple) and _has_proxy(v))
        or (isinstance(v, dict) and _has_proxy(v.values()))
        for v in values
    )


class _RecordFactories(TorchFunctionMode):
    """Records what makes a tensor of nothing; refuses what computes behind the graph's back."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        values = (*args, *kwargs.values())
        if not _has_proxy(values) and any(isinstance(a, Tensor) for a in values):
            name = getattr(func, "__name__", func)
            raise Untraceable(f"it uses {name} on a tensor that is no input")
        return func(*args, **kwargs)

    # ------------------------------------------------------------------------------ no side effects


def _contents(value: Any) -> Any:
    """A shallow copy of a container, to see later whether it was changed."""
    return type(value)(value) if type(value) in (list, dict, set, OrderedDict) else None


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Undo, and refuse, every change to attributes of ``root`` and of what is below it."""
    before = [
        (m, dict(vars(m)), {k: c for k, v in vars(m).items() if (c := _contents(v)) is not None})
        for m in root.modules()
        if not isinstance(m, torch.jit.ScriptModule)  # These look attributes up lazily.
    ]
    try:
        yield
    finally:
        culprit = ""
        for module, attributes, containers in before:
            now = vars(module)
            changed = [
                k for k in {*now, *attributes} if now.get(k, _NONE) is not attributes.get(k, _NONE)
            ]
            if changed:
                now.clear()
                now.update(attributes)
            for name, content in containers.items():
                value = now[name]
                if not _same(value, content):
                    changed.append(name)
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
            if changed:
                culprit = culprit or f"{type(module).__name__}.{changed[0]}"
    if culprit:
        raise Untraceable(f"its forward changes {culprit}")


_NONE = object()


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(x is y and a[x] is b[y] for x, y in zip(a, b, strict=True))
    if isinstance(a, set):
        return bool(a == b)
    return all(x is y for x, y in zip(a, b, strict=True))
