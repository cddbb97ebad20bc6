"""`fuse`: the same model, with the same parameters, calling fused ops; and `unfuse`, the way back.

Each module keeps its place in the tree. One whose forward contains sites (see
`fused_resnet.patterns`) gets a class derived from its own, whose forward is the rewritten graph of
the old one; all others stay as they are. So attributes, children, hooks, ``isinstance`` and
state_dict are those of the original, a module's forward can still be called on its own, and where
one forward cannot be traced, those of the modules below it still can.

A graph shows what forward did once. What it rests on (see `Plan`) is looked at again at every call,
and where it no longer holds the stock forward runs.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fused_resnet import hooks, nodes, patterns, tracing
from fused_resnet.backends import FusedResNetWarning
from fused_resnet.functional import conv_bn_act, conv_bn_act_maxpool
from fused_resnet.patterns import Match, Site
from fused_resnet.tracing import FusedModule, Key, Trace, Untraceable, stock_class

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """The same model, calling fused ops where convolution, batch norm, add and ReLU meet.

    The result shares every parameter and buffer with ``model``: training or loading one changes
    both. It has the same classes (subclasses of them), attributes, state_dict keys and hooks.
    ``model`` itself is left as it is. In train mode the stock modules run, to the same gradients
    and running statistics. Conversions such as ``.half()`` or ``.to(device)`` of the result as a
    whole leave ``model`` alone.

    What was fused, what was not and why: `fused_resnet.explain`.

    Args:
        model: any module. Where its forward cannot be traced, the modules within it are fused.

    Returns:
        A new module. A `FusedResNetWarning` tells if there was nothing to fuse, or if the model was
        made in inference mode, which makes calls slow.

    Raises:
        TypeError: ``model`` is not a module, or is compiled, scripted or wrapped: fuse what is
            inside.
        ValueError: ``model`` is quantised or prepared for quantisation, or has uninitialised
            parameters.

    Example:
        >>> model = torchvision.models.resnet50(weights="DEFAULT").eval()
        >>> fused = fused_resnet.fuse(model)
        >>> fused(images)
    """
    reject_unsupported(model)
    fused = clone(model)
    restore_classes(fused)
    analyses = analyse(fused)
    for analysis in analyses:
        if analysis.sites:
            install(analysis)
    if not any(analysis.sites or analysis.own_calls for analysis in analyses):
        warnings.warn(
            f"fuse found nothing to fuse in {type(model).__name__}; "
            "fused_resnet.explain(model) tells why",
            FusedResNetWarning,
            stacklevel=2,
        )
    elif not isinstance(fused, FusedModule):
        # Its forward stays; conversions and pickling must know what is below.
        _set_class(fused, _derive(stock_class(fused), None))
    if any(p.is_inference() for p in fused.parameters()):
        warnings.warn(
            f"parameters of {type(model).__name__} were made in torch.inference_mode(), and torch "
            "keeps no record of changes: kernels that pack weights pack them anew at every call. "
            "Make and load the model outside of it; calls may be inside",
            FusedResNetWarning,
            stacklevel=2,
        )
    return fused


def unfuse(model: Model) -> Model:
    """The model that `fuse` was given, as it is now: original classes, the same parameters.

    Args:
        model: a result of `fuse`, or any module that contains one.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> stock = fused_resnet.unfuse(fused)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse takes a torch.nn.Module, got {type(model).__name__}")
    plain = clone(model)
    restore_classes(plain)
    return plain


# --------------------------------------------------------------------------------------------------
# Input: what can be fused, and a copy of it that shares all tensors.
# --------------------------------------------------------------------------------------------------

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
_QUANTISATION = ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic")
_QUANTISATION_CLASSES = ("QuantStub", "DeQuantStub", "FakeQuantize", "QuantWrapper")


def reject_unsupported(model: object) -> None:
    """Raise for what `fuse` and `explain` cannot take; see there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{name} is scripted or traced by torch.jit; fuse the Python model instead")
    if name in _WRAPPERS and type(model).__module__.startswith("torch."):
        inner = _WRAPPERS[name]
        raise TypeError(f"{name} wraps a model: fuse what is inside (model.{inner}), then wrap it")
    for path, module in model.named_modules():
        cls = type(module)
        if cls.__module__.startswith(_QUANTISATION) or (
            cls.__module__.startswith("torch.ao.") and cls.__name__ in _QUANTISATION_CLASSES
        ):
            raise ValueError(
                f"{path or 'the model'} is a {cls.__name__}: quantised models, and models prepared "
                "for quantisation, are not fused; take the float variant of the model"
            )
        if any(is_lazy(p) for p in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(f"{path} ({cls.__name__}) is not initialised yet; run the model once")


def clone(model: Model) -> Model:
    """A copy of the module tree that shares every tensor and every hook with ``model``."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            _share(value, memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as e:
        raise TypeError(f"{type(model).__name__} cannot be copied: {type(e).__name__}: {e}") from e


def _share(value: Any, memo: dict[int, Any]) -> None:
    """Have deepcopy keep the tensors and functions in an attribute of a module as they are."""
    if isinstance(value, Tensor):
        memo[id(value)] = value
    elif isinstance(value, dict):
        for v in value.values():
            if isinstance(v, nn.Module):
                continue
            # A hook is not ours to copy, unless it is a method of the model itself.
            if callable(v) and not isinstance(getattr(v, "__self__", None), nn.Module):
                memo[id(v)] = v
            else:
                _share(v, memo)
    elif isinstance(value, list | tuple | set):
        for v in value:
            if not isinstance(v, nn.Module):
                _share(v, memo)


def restore_classes(model: nn.Module) -> None:
    """Make every fused module within ``model`` an instance of its original class again."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            _set_class(module, stock_class(module))
            for name in _STATE:
                vars(module).pop(name, None)


# --------------------------------------------------------------------------------------------------
# Analysis: for each module that has a forward of its own, the sites in it.
# --------------------------------------------------------------------------------------------------


@dataclass
class Analysis:
    """What the forward of one module consists of.

    Attributes:
        path: of the module.
        module: the module.
        trace: of its forward and all forwards below it; None if that cannot be traced.
        match: sites and reasons in ``trace``.
        sites: those sites that are this module's to rewrite: they lie in its own forward, or begin
            in one submodule and end in another.
        plan: the rewritten forward, if there are sites.
        reason: why there is no trace or no plan.
        own_calls: how many calls of fused functions its own forward contains already.
    """

    path: str
    module: nn.Module
    trace: Trace | None = None
    match: Match | None = None
    sites: tuple[Site, ...] = ()
    plan: Plan | None = None
    reason: str | None = None
    own_calls: int = 0


def analyse(model: nn.Module) -> list[Analysis]:
    """Analyse every module of ``model`` that is no leaf, outermost first; nothing is changed."""
    found: list[Analysis] = []
    fused: set[nn.Module] = set()
    with _mode(model, training=False), torch.no_grad():
        for path, module in model.named_modules():
            if not tracing.is_leaf(module) and _has_forward(module):
                analysis = _analyse(path, module, fused)
                fused |= _modules_of_own_calls(analysis)
                found.append(analysis)
    return found


def _modules_of_own_calls(analysis: Analysis) -> set[nn.Module]:
    """Modules that forward passes to fused functions by itself, as this package's modules do."""
    if analysis.trace is None:
        return set()
    return {
        analysis.module.get_submodule(str(argument.target))
        for node in analysis.trace.graph.nodes
        if node.op == "call_function" and node.target in patterns.OWN_FUNCTIONS
        for argument in node.args[1:3]
        if isinstance(argument, fx.Node) and argument.op == "get_attr" and _is_module(argument)
    }


def _is_module(node: fx.Node) -> bool:
    """Whether a get_attr node stands for a module, as the functional layer records them."""
    (user,) = node.users
    return user.target in (*nodes.FUNCTIONS, conv_bn_act, conv_bn_act_maxpool)


def _has_forward(module: nn.Module) -> bool:
    # The classes of scripted modules have no forward to look at.
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or stock_class(module).forward is not nn.Module.forward


def _analyse(path: str, module: nn.Module, fused: set[nn.Module] | None = None) -> Analysis:
    """Analyse one module; sites of convolutions in ``fused`` are not its to make."""
    analysis = Analysis(path, module)
    try:
        analysis.trace = tracing.trace(module)
    except Untraceable as e:
        analysis.reason = str(e)
        return analysis
    trace = analysis.trace
    analysis.own_calls = sum(
        node.target in patterns.OWN_FUNCTIONS and len(node.meta["key"]) == 1
        for node in trace.graph.nodes
        if node.op == "call_function"
    )
    modules = dict(module.named_modules())
    analysis.match = patterns.match(trace.graph, modules)
    if fused:
        analysis.match.sites = [
            site
            for site in analysis.match.sites
            if site.conv is None or modules[str(site.conv.target)] not in fused
        ]
    inline, sites = _own_sites(trace, analysis.match.sites)
    if not sites:
        return analysis
    try:
        analysis.plan = _plan(module, inline, sites)
        analysis.sites = sites
    except Untraceable as e:
        analysis.reason = str(e)
    return analysis


def _frame_of(site: Site) -> Key:
    """The innermost call that contains all of a site."""
    keys = [node.meta["key"][:-1] for node in site.parts]
    frame: Key = keys[0]
    while any(key[: len(frame)] != frame for key in keys):
        frame = frame[:-1]
    return frame


def _own_sites(trace: Trace, sites: list[Site]) -> tuple[frozenset[Key], tuple[Site, ...]]:
    """Which calls the outer forward must be traced through, and the sites that then lie in it."""
    inline: set[Key] = set()
    own: list[Site] = []
    if not any(_frame_of(site) == () for site in sites):
        return frozenset(), ()
    changed = True
    while changed:
        changed = False
        for key, frame in trace.frames.items():
            # Calls that pass containers of tensors cannot stand in a graph as one node.
            if not frame.plain and key not in inline and (key[:-1] == () or key[:-1] in inline):
                inline.add(key)
                changed = True
        for site in sites:
            frame_key = _frame_of(site)
            if site not in own and (frame_key == () or frame_key in inline):
                own.append(site)
                changed = True
                for node in site.nodes:
                    key = node.meta["key"][:-1]
                    while key != () and key not in inline:
                        inline.add(key)
                        key = key[:-1]
    return frozenset(inline), tuple(own)


# --------------------------------------------------------------------------------------------------
# Plan: the rewritten forward of one module.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inlined:
    """A submodule that a graph was traced through or looked through, as it was then.

    Attributes:
        path: within the module that the graph is of.
        cls: its class.
        children: how many it had.
        settings: its attributes that are plain values.
    """

    path: str
    cls: type[nn.Module]
    children: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The rewritten forward of a module, and what it rests on.

    Attributes:
        graph: the rewritten graph; its calls of ``fused_resnet.nodes`` are the fused sites.
        source: the code of the graph.
        run: the graph as a function of the module and `inputs`.
        inputs: arguments of forward that the graph takes.
        fixed: arguments with a default, which must have it.
        tensors: inputs that must be tensors.
        structure: of the returned value, if it is more than a tensor.
        eval_only: whether forward does something else in train mode.
        children: how many children the module had.
        inlined: submodules whose forward, or whose list of children, is part of the graph.
        key: plans of one class with equal keys are equal.
    """

    graph: fx.Graph
    source: str
    run: Callable[..., Any]
    inputs: tuple[str, ...]
    fixed: dict[str, Any]
    tensors: frozenset[str]
    structure: pytree.TreeSpec | None
    eval_only: bool
    children: int
    inlined: tuple[Inlined, ...]
    key: tuple[Any, ...]


def _plan(module: nn.Module, inline: frozenset[Key], sites: tuple[Site, ...]) -> Plan:
    """Trace ``module`` anew, through the calls ``inline`` only, and rewrite the sites."""

    def rewritten() -> tuple[Trace, fx.Graph, str, dict[str, Any]]:
        trace = tracing.trace(module, inline.__contains__)
        _rewrite(trace.graph, sites)
        code = trace.graph.python_code("self")
        return trace, trace.graph, code.src, code.globals

    trace, graph, source, scope = rewritten()
    through = [frame.path for key, frame in trace.frames.items() if key in inline]
    eval_only = False
    # A Sequential does the same in every mode; the tracing of all others is repeated in train mode.
    traced = (module, *map(module.get_submodule, through))
    if any(stock_class(m).forward is not nn.Sequential.forward for m in traced):
        with _mode(module, training=True), torch.enable_grad():
            eval_only = _source_or_none(rewritten) != source
    if eval_only:
        with torch.enable_grad():
            if _source_or_none(rewritten) != source:
                raise Untraceable("its forward depends on whether gradients are enabled")
    through += [str(node.target) for site in sites for node in site.skipped]
    through += _containers(module, set(through))
    inlined = tuple(_inlined(path, module.get_submodule(path)) for path in dict.fromkeys(through))
    functions = tuple((name, id(value)) for name, value in sorted(scope.items()))
    return Plan(
        graph,
        source,
        _compile(source, scope, f"{stock_class(module).__name__}.fused"),
        tuple(trace.inputs),
        trace.fixed,
        frozenset(trace.tensors),
        trace.structure,
        eval_only,
        len(module._modules),
        inlined,
        (source, functions, eval_only, len(module._modules), repr(inlined), repr(trace.structure)),
    )


def _source_or_none(rewritten: Callable[[], tuple[Trace, fx.Graph, str, Any]]) -> str | None:
    try:
        return rewritten()[2]
    except Untraceable:
        return None


def _containers(module: nn.Module, through: set[str]) -> list[str]:
    """Paths of the ModuleLists that the forwards of ``module`` and ``through`` can loop over."""
    found: list[str] = []
    for path, child in module.named_modules():
        parent = path.rpartition(".")[0]
        if path and not _has_forward(child) and (parent == "" or parent in {*through, *found}):
            found.append(path)
    return found


def _inlined(path: str, module: nn.Module) -> Inlined:
    settings = {
        name: value
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES and isinstance(value, bool | int | float | str | None)
    }
    return Inlined(path, stock_class(module), len(module._modules), settings)


def _rewrite(graph: fx.Graph, sites: tuple[Site, ...]) -> None:
    """Replace the nodes of each site by one call."""
    at: dict[Key, fx.Node] = {n.meta["key"]: n for n in graph.nodes if "key" in n.meta}

    def here(node: fx.Node) -> fx.Node:
        found = at.get(node.meta["key"])
        if found is None or (found.op, found.target) != (node.op, node.target):
            raise Untraceable("its forward takes another way when it is traced again")
        return found

    for site in sites:
        parts = [here(node) for node in site.parts]
        last = parts[-1]
        # Without a residual the call stands where the convolution stood and reads its input there.
        place = last if site.add is not None else parts[0]
        with graph.inserting_before(place):
            call = _call(graph, site, here)
        last.replace_all_uses_with(call)
        for node in sorted(map(here, site.nodes), reverse=True):
            graph.erase_node(node)
    graph.lint()


def _call(graph: fx.Graph, site: Site, here: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The call that stands for ``site``, with the modules of the site as arguments."""

    def module(node: fx.Node | None) -> fx.Node | str | None:
        """The module that a node calls; "relu" for a ReLU that is called as a function."""
        if node is None:
            return None
        if node.op != "call_module":
            return "relu"
        return graph.create_node("get_attr", node.target, (), {})

    if site.conv is None:
        assert site.add is not None
        a, b = here(site.add).args
        keywords: dict[str, Any] = {"inplace": True} if site.inplace else {}
        return graph.call_function(nodes.add_relu, (a, b, module(site.act)), keywords)
    x = here(site.conv).args[0]
    layers = module(site.conv), module(site.norm)
    if site.pool is not None:
        pool: Any = module(site.pool)
        if pool == "relu":
            pool = patterns.pool_arguments(site.pool)
            nodes.pool_module(pool)  # Now, so that torch.compile need not make it.
        return graph.call_function(
            nodes.conv_bn_act_maxpool, (x, *layers, module(site.act), pool), {}
        )
    if site.add is None:
        return graph.call_function(nodes.conv_bn_act, (x, *layers, module(site.act)), {})
    add = here(site.add)
    residual = cast(fx.Node, add.args[0 if site.residual is site.add.args[0] else 1])
    keywords = {}
    if site.first_act is not None:
        keywords["first_act"] = module(site.first_act)
    if add.target is operator.iadd or add.target == "add_":
        keywords["add"] = "residual_iadd" if residual is add.args[0] else "iadd"
    return graph.call_function(
        nodes.conv_bn_act, (x, *layers, module(site.act), residual), keywords
    )


def _compile(source: str, scope: dict[str, Any], name: str) -> FunctionType:
    """The function that ``source`` defines, with its source known to tracebacks."""
    filename = f"<fused_resnet {name} {hash(source):x}>"
    scope = dict(scope)
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return cast(FunctionType, scope["forward"])


# --------------------------------------------------------------------------------------------------
# Classes: a module's own class with the rewritten forward.
# --------------------------------------------------------------------------------------------------

#: What `install` keeps on an instance.
_STATE = ("_fused_links", "_fused_changed")

#: Attributes of every module; setting them does not change what forward means, or is looked at
#: anyway.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "__class__", *_STATE}

_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)
_NONE = object()


def plan_of(module: nn.Module) -> Plan | None:
    """The rewritten forward of ``module``; None if its forward is its own."""
    return cast("Plan | None", getattr(type(module), "_fused_plan", None))


def install(analysis: Analysis) -> None:
    """Give the analysed module its rewritten forward."""
    module, plan = analysis.module, analysis.plan
    assert plan is not None
    links = {}
    for inlined in plan.inlined:
        parent = module
        for name in inlined.path.split("."):
            child = cast(nn.Module, parent._modules[name])
            record = inlined if child is module.get_submodule(inlined.path) else None
            links[id(parent), name] = (parent, name, child, record)
            parent = child
    _set_class(module, _derive(stock_class(module), plan))
    vars(module)["_fused_links"] = tuple(links.values())


def why_stale(module: nn.Module) -> str | None:
    """Why the rewritten forward of ``module`` does not hold as things are now; None if it does.

    The module's own forward runs then, with all that is fused in the modules below it.
    """
    plan = plan_of(module)
    assert plan is not None
    if plan.eval_only and module.training:
        return "its forward does something else in train mode, so there the stock one runs"
    if len(module._modules) != plan.children:
        return "children were added or removed after it was fused"
    changed = vars(module).get("_fused_changed")
    if changed is not None:
        return f"its attribute {changed!r} was changed after it was fused"
    if plan.inlined and hooks.is_everywhere():
        return (
            "a hook is registered for all modules, and must see those that the graph runs through"
        )
    for parent, name, child, record in vars(module).get("_fused_links", ()):
        if parent._modules.get(name) is not child:
            return f"{name!r} was replaced after it was fused"
        if record is not None:
            if len(child._modules) != record.children or hooks.is_on(child):
                return f"children or hooks of {record.path!r} changed after it was fused"
            if plan.eval_only and child.training:
                return f"{record.path!r} is in train mode"
            attributes = vars(child)
            for setting, value in record.settings.items():
                if attributes.get(setting, _NONE) != value:
                    return f"{record.path}.{setting} was changed after it was fused"
    return None


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # Past a __setattr__ of the module's own: the attribute is Python's.
    object.__setattr__(module, "__class__", cls)


def _derive(stock: type[nn.Module], plan: Plan | None) -> type[nn.Module]:
    """A class derived from ``stock`` that runs ``plan``, and converts and pickles as it should."""
    key = (stock, None if plan is None else plan.key)
    with _lock:
        cls = _classes.get(key)
        if cls is None:
            namespace: dict[str, Any] = {
                "__doc__": stock.__doc__,
                "__module__": stock.__module__,
                "__qualname__": stock.__qualname__,
                "__slots__": (),
                "_fused_plan": plan,
                "__reduce_ex__": _reduce_ex,
                "__copy__": _copy,
                "__setattr__": _setattr,
                "_apply": _apply,
            }
            if not hasattr(stock, "__deepcopy__"):
                namespace["__deepcopy__"] = _deepcopy
            if plan is not None:
                namespace["forward"] = _forward(stock, plan)
            metaclass: Any = type(stock)
            cls = cast(
                "type[nn.Module]", metaclass(stock.__name__, (stock, FusedModule), namespace)
            )
            _classes[key] = cls
    return cls


_lock = threading.Lock()


def _forward(stock: type[nn.Module], plan: Plan) -> Callable[..., Any]:
    """A forward with the signature of stock's: the graph where it holds, else stock's forward."""
    parameters = list(inspect.signature(stock.forward).parameters.values())
    scope: dict[str, Any] = {
        "_fused_run": plan.run,
        "_fused_stale": why_stale,
        "_fused_stock": stock.forward,
        "_fused_tensor": Tensor,
        "_fused_unflatten": pytree.tree_unflatten,
        "_fused_structure": plan.structure,
    }
    me = parameters[0].name
    # What can change in every module is looked at without a call; see `why_stale`.
    conditions = [
        f"len({me}._modules) == {plan.children}",
        f"'_fused_changed' not in {me}.__dict__",
        *([f"not {me}.training"] if plan.eval_only else []),
        *([f"_fused_stale({me}) is None"] if plan.inlined else []),
    ]
    declared, passed, star = [me], [me], False
    for p in parameters[1:]:
        if p.kind is p.VAR_POSITIONAL:
            declared.append(f"*{p.name}")
            passed.append(f"*{p.name}")
            star = True
            conditions.append(f"not {p.name}")
        elif p.kind is p.VAR_KEYWORD:
            declared.append(f"**{p.name}")
            passed.append(f"**{p.name}")
            conditions.append(f"not {p.name}")
        else:
            if p.kind is p.KEYWORD_ONLY and not star:
                declared.append("*")
                star = True
            passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name)
            if p.name in plan.fixed:
                scope[f"_fused_default_{p.name}"] = p.default
                declared.append(f"{p.name}=_fused_default_{p.name}")
                conditions.append(f"{p.name} is _fused_default_{p.name}")
            else:
                declared.append(p.name)
                conditions.append(
                    f"isinstance({p.name}, _fused_tensor)"
                    if p.name in plan.tensors
                    else f"{p.name} is not None"
                )
    call = f"_fused_run({', '.join((me, *plan.inputs))})"
    if plan.structure is not None:
        call = f"_fused_unflatten({call}, _fused_structure)"
    source = (
        f"def forward({', '.join(declared)}):\n"
        f"    if {' and '.join(conditions)}:\n"
        f"        return {call}\n"
        f"    return _fused_stock({', '.join(passed)})\n"
    )
    function = _compile(source, scope, stock.__name__)
    function.__doc__ = stock.forward.__doc__
    function.__annotations__ = dict(getattr(stock.forward, "__annotations__", {}))
    function.__qualname__ = f"{stock.__qualname__}.forward"
    return function


def _setattr(self: nn.Module, name: str, value: Any) -> None:
    """Notice what a graph cannot know: another value of an attribute that forward may have read."""
    made = "_modules" in vars(self)  # Some classes set attributes before nn.Module has made it.
    if made and name not in _MODULE_ATTRIBUTES and not isinstance(value, Tensor):
        before = vars(self).get(name, _NONE)
        if before is _NONE:
            for members in (self._modules, self._parameters, self._buffers):
                if name in members and (members[name] is None) != (value is None):
                    vars(self)["_fused_changed"] = name
        elif before is not value and not _equal(before, value):
            vars(self)["_fused_changed"] = name
    stock_class(self).__setattr__(self, name, value)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str | tuple) and a == b


# --------------------------------------------------------------------------------------------------
# Copies, pickles and conversions.
# --------------------------------------------------------------------------------------------------


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    vars(new).update(copy.deepcopy(vars(self), memo))
    return new


def _copy(self: nn.Module) -> nn.Module:
    new = type(self).__new__(type(self))
    vars(new).update(vars(self))
    return new


def _reduce_ex(self: nn.Module, protocol: int) -> Any:
    """Pickle as the stock class, to be fused again at load; other versions make other graphs."""
    stock = stock_class(self)
    if stock.__reduce_ex__ is not object.__reduce_ex__ or stock.__reduce__ is not object.__reduce__:
        return stock.__reduce_ex__(self, protocol)
    _, _, state, items, pairs = cast(
        "tuple[Any, ...]", object.__reduce_ex__(self, max(2, protocol))
    )
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name not in _STATE}
    return _blank, (stock,), (plan_of(self) is not None, state), items, pairs, _restore


def _blank(stock: type[nn.Module]) -> nn.Module:
    return stock.__new__(stock)


def _restore(module: nn.Module, pickled: tuple[bool, Any]) -> None:
    """Set the state of an unpickled module and fuse it again."""
    has_plan, state = pickled
    module.__setstate__(state)
    if not has_plan:
        _set_class(module, _derive(stock_class(module), None))
        return
    with _mode(module, training=False), torch.no_grad():
        analysis = _analyse("", module)
    if analysis.sites:
        install(analysis)
    else:
        warnings.warn(
            f"a {type(module).__name__} was fused when it was saved, and cannot be fused here: "
            f"{analysis.reason or 'no sites were found'}",
            FusedResNetWarning,
            stacklevel=2,
        )


#: Parameters that a fused model no longer shares with the model it was made from.
_private = WeakIdKeyDictionary()
_converting = threading.local()


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    """Convert, as ``.half()`` and ``.to()`` do, but not the model that shares the parameters.

    torch converts a parameter by exchanging the data within it, which the other model would see,
    and replaces a buffer, which it would not: it would be left half converted.
    """
    convert: Callable[..., nn.Module] = stock_class(self)._apply
    if getattr(_converting, "active", False):
        return convert(self, fn, *args, **kwargs)
    _converting.active = True
    try:
        _detach_converted(self, fn)
        return convert(self, fn, *args, **kwargs)
    finally:
        _converting.active = False


def _detach_converted(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Replace each shared parameter that ``fn`` changes by one of our own with the same data."""
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in _private:
                continue
            if id(parameter) not in own:
                with torch.no_grad():
                    if _is_same(fn(parameter), parameter):
                        continue
                mine = nn.Parameter(parameter.detach(), parameter.requires_grad)
                if parameter.grad is not None:
                    mine.grad = parameter.grad.detach()
                own[id(parameter)] = mine
                _private[mine] = True
            module._parameters[name] = own[id(parameter)]


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.dtype == b.dtype
        and a.device == b.device
        and a.layout == b.layout == torch.strided
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
    )


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the training flag of every module for the block, and nothing else."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            vars(module)["training"] = training
        yield
    finally:
        for module, mode in before:
            vars(module)["training"] = mode
