"""`explain`: what became of every convolution, norm, activation and sum of a model, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from fused_resnet import backends, functional, patterns
from fused_resnet.backends import Choice, FusedResNetWarning
from fused_resnet.chain import Chain, find_chains
from fused_resnet.fuse import (
    Analysis,
    analyse,
    fuse,
    plan_of,
    reject_unsupported,
    unfuse,
    why_stale,
)
from fused_resnet.patterns import Kind, Site
from fused_resnet.tracing import FusedModule, Untraceable, is_leaf, stock_class

Outcome = Literal["fused", "fusable", "stock"]

_KINDS: dict[Kind, str] = {
    "conv": "convolutions",
    "norm": "norms",
    "act": "activations",
    "add": "sums",
    "maxpool": "max-poolings",
}


@dataclass(frozen=True)
class Row:
    """One call of a convolution, norm, activation, sum or max-pooling.

    Attributes:
        path: of the module that is called, or of the module whose forward calls a function or
            operator.
        kind: ``conv``, ``norm``, ``act``, ``add`` or ``maxpool``.
        type: the module's class, or the name of the function.
        outcome: ``fused``; ``fusable``: `fuse` would fuse it; ``stock``: it stays as it is.
        op: the fused function that it is part of.
        parts: what that function replaces, in order.
        reason: why it is not fused, or why its stock modules run at present all the same.
        kernel: what computed the op on the example, as ``backend/name``; several are separated by
            commas.
        rejected: (kernel, reason) of the kernels that come first but could not compute it.
    """

    path: str
    kind: Kind
    type: str
    outcome: Outcome
    op: str | None = None
    parts: tuple[str, ...] = ()
    reason: str | None = None
    kernel: str | None = None
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this is the part that an op is listed by."""
        return self.op is not None and self.kind == ("add" if self.op == "add_relu" else "conv")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes:
        model: class of the model.
        rows: one for each call, grouped by the module whose forward makes it.
        untraceable: why the forward of a module could not be looked into, by path.
        chains: bottlenecks that `fused_resnet.chain` would compute in chains, and why not others.
    """

    model: str
    rows: tuple[Row, ...]
    untraceable: dict[str, str] = field(default_factory=dict)
    chains: tuple[Chain, ...] = ()

    def counts(self) -> dict[Kind, tuple[int, int]]:
        """For each kind: how many calls are fused (in a stock model: would be), of how many."""
        return {
            kind: (
                sum(r.kind == kind and r.outcome != "stock" for r in self.rows),
                sum(r.kind == kind for r in self.rows),
            )
            for kind in _KINDS
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return {
            "model": self.model,
            "counts": {kind: list(count) for kind, count in self.counts().items()},
            "rows": [asdict(row) for row in self.rows],
            "untraceable": dict(self.untraceable),
            "chains": [asdict(found) for found in self.chains],
        }

    def __str__(self) -> str:
        verb = "would be fused" if any(r.outcome == "fusable" for r in self.rows) else "fused"
        counts = [
            f"{fused} of {total} {_KINDS[kind]}"
            for kind, (fused, total) in self.counts().items()
            if total
        ]
        lines = [
            f"{self.model}: {', '.join(counts) or 'nothing to fuse'}{' ' + verb if counts else ''}"
        ]
        for path, reason in self.untraceable.items():
            lines.append(f"  {path or 'the model itself'} is looked into part by part: {reason}")
        table = [("path", "type", "outcome", "op", "kernel")]
        for row in self.rows:
            if row.op is None:
                what = row.reason or ""
            else:
                what = f"in {row.parts[0]}"
                if row.is_first:
                    what = f"{row.op}: {' + '.join(_without_common_parent(row.parts))}"
                if row.reason is not None and row.is_first:
                    what += f" ({row.reason})"
            kernel = row.kernel if row.is_first else None
            table.append((row.path, row.type, row.outcome, what, kernel or ""))
        widths = [min(60, max(len(r[i]) for r in table)) for i in range(4)]
        for r in table:
            cells = (cell.ljust(width) for cell, width in zip(r, widths, strict=False))
            lines.append("  ".join((*cells, r[4])).rstrip())
        if self.chains:
            lines.append("Bottlenecks that fused_resnet.chain could compute in chains, on GPUs:")
            lines += [f"  {text}" for text in _summed(self.chains)]
        return "\n".join(lines)


def explain(model: nn.Module, example: Any = None) -> Explanation:
    """What `fuse` made, or would make, of every convolution, norm, activation, sum and max-pooling.

    Args:
        model: a fused model, a stock one, or one of this package's own.
        example: an input, or a tuple of all arguments. The model is run on it once (its buffers and
            the random state are put back), and the rows tell the kernels that ran. A stock model is
            fused for that first.

    Returns:
        The rows, as a table to print or as data.

    Raises:
        TypeError: as `fuse`.
        ValueError: as `fuse`.

    Example:
        >>> print(fused_resnet.explain(fused_resnet.fuse(model), images))
    """
    reject_unsupported(model)
    was_stock = not any(isinstance(m, FusedModule) for m in model.modules())
    analyses = analyse(unfuse(model))
    subject = model
    if was_stock and example is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FusedResNetWarning)
            subject = fuse(model)
    table = _Table(subject, analyses, was_stock)
    table.fill()
    if example is not None:
        table.observe(example if isinstance(example, tuple) else (example,))
    untraceable = {
        a.path: a.reason for a in analyses if a.reason is not None and _has_parts(a.module)
    }
    name = stock_class(model).__name__
    return Explanation(name, table.sorted_rows(), untraceable, _chains(model))


def _summed(chains: tuple[Chain, ...]) -> list[str]:
    """A line for each chain, and one for all blocks that are refused for the same reason."""
    lines = [str(found) for found in chains if found.reason is None]
    refused: dict[str, list[str]] = {}
    for found in chains:
        if found.reason is not None:
            refused.setdefault(found.reason, []).append(found.path)
    for reason, paths in refused.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"{paths[0]}{more}: not chained, {reason}")
    return lines


def _chains(model: nn.Module) -> tuple[Chain, ...]:
    try:
        return tuple(find_chains(model))
    except Untraceable:  # It is looked into part by part, which `untraceable` tells.
        return ()


def _without_common_parent(paths: tuple[str, ...]) -> list[str]:
    """Paths, shortened by the names of the modules that they all lie in."""
    names = [path.split(".") for path in paths]
    common = 0
    while all(len(n) > common + 1 and n[common] == names[0][common] for n in names):
        common += 1
    return [".".join(n[common:]) for n in names]


def _has_parts(module: nn.Module) -> bool:
    """Whether the forward of ``module`` may call something that can be fused."""
    return any(_kind_of_module(child) is not None for child in module.children())


def _kind_of_module(module: nn.Module) -> Kind | None:
    node = fx.Graph().call_module("m")
    return patterns.kind_of(node, {"m": module})


#: A call: path of the module whose forward makes it, and its number among the calls there.
_Place = tuple[str, int]


def _join(*paths: str) -> str:
    return ".".join(p for p in paths if p)


class _Table:
    def __init__(self, model: nn.Module, analyses: list[Analysis], was_stock: bool) -> None:
        self.model = model
        self.analyses = analyses
        self.was_stock = was_stock
        self.rows: dict[_Place, Row] = {}
        # Places by the module that makes the call and by the convolution's weight (None: add_relu).
        self.sites: dict[tuple[int, int | None], list[list[_Place]]] = {}

    # ----------------------------------------------------------------------------------- filling in

    def fill(self) -> None:
        for analysis in self.analyses:
            self.add_sites(analysis)
            self.add_own_calls(analysis)
        for analysis in self.analyses:
            self.add_reasons(analysis)
        self.add_unseen()

    def place(self, analysis: Analysis, node: fx.Node) -> _Place:
        assert analysis.trace is not None
        *frame, index = node.meta["key"]
        inner = analysis.trace.frames[tuple(frame)].path if frame else ""
        return _join(analysis.path, inner), index

    def row(self, analysis: Analysis, node: fx.Node, kind: Kind, outcome: Outcome) -> Row:
        if node.op == "call_module":
            path = _join(analysis.path, str(node.target))
            cls = stock_class(analysis.module.get_submodule(str(node.target)))
            return Row(path, kind, cls.__name__, outcome)
        return Row(self.place(analysis, node)[0], kind, patterns.function_name(node), outcome)

    def add_sites(self, analysis: Analysis) -> None:
        """The sites that are rewritten in the forward of one module."""
        if not analysis.sites:
            return
        actual = self.model.get_submodule(analysis.path)
        plan = plan_of(actual)
        outcome: Outcome = "fusable" if self.was_stock else "fused"
        why: str | None = None
        if plan is not None:
            assert analysis.plan is not None
            why = why_stale(actual)
            if why is None and plan.source != analysis.plan.source:
                why = "the model was changed after it was fused"
        elif not self.was_stock:
            outcome, why = "stock", "the model was changed after it was fused; fuse it again"
        for site in analysis.sites:
            self.add_site(analysis, site, outcome, why, actual)

    def add_site(
        self, analysis: Analysis, site: Site, outcome: Outcome, why: str | None, actual: nn.Module
    ) -> None:
        op = "add_relu" if site.conv is None else "conv_bn_act"
        if site.pool is not None:
            op = "conv_bn_act_maxpool"
        rows = []
        for node in site.parts:
            kind = patterns.kind_of(node, _Modules(analysis.module))
            assert kind is not None
            rows.append((self.place(analysis, node), self.row(analysis, node, kind, outcome)))
        weight = None
        if site.conv is not None:
            conv = actual.get_submodule(str(site.conv.target))
            norm = None if site.norm is None else actual.get_submodule(str(site.norm.target))
            why = why or functional.why_stock(conv, norm)
            weight = id(getattr(conv, "weight", None))
        note = None if why is None else why if outcome == "stock" else f"stock at present: {why}"
        parts = tuple(self.label(row) for _, row in rows)
        for place, row in rows:
            self.rows[place] = replace(row, op=op, parts=parts, reason=note)
        self.sites.setdefault((id(actual), weight), []).append([place for place, _ in rows])

    def label(self, row: Row) -> str:
        """How a part is called where its op is listed."""
        return row.path if row.type[:1].isupper() else _join(row.path, row.type)

    def add_own_calls(self, analysis: Analysis) -> None:
        """Calls of fused functions that stood in forward before, as in this package's modules."""
        if not analysis.own_calls or analysis.trace is None:
            return
        actual = self.model.get_submodule(analysis.path)
        for node in analysis.trace.graph.nodes:
            if node.op != "call_function" or node.target not in patterns.OWN_FUNCTIONS:
                continue
            if len(node.meta["key"]) == 1:
                self.add_own_call(analysis, node, actual)

    def add_own_call(self, analysis: Analysis, node: fx.Node, actual: nn.Module) -> None:
        path, index = self.place(analysis, node)
        op = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        modules = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        rows: list[Row] = []
        conv: nn.Module | None = None
        norm: nn.Module | None = None
        for attribute in modules:
            try:
                module = actual.get_submodule(str(attribute.target))
            except AttributeError:
                continue  # A parameter.
            kind = _kind_of_module(module)
            if kind is not None:
                conv = module if kind == "conv" else conv
                norm = module if kind == "norm" else norm
                name = _join(analysis.path, str(attribute.target))
                rows.append(Row(name, kind, stock_class(module).__name__, "fused"))
        residual = node.args[4] if len(node.args) > 4 else node.kwargs.get("residual")
        if op == "add_relu" or (op == "conv_bn_act" and isinstance(residual, fx.Node)):
            total = Row(path, "add", op if op == "add_relu" else "add", "fused")
            rows.insert(len(rows) - (bool(rows) and rows[-1].kind == "act"), total)
        why = None if conv is None else functional.why_stock(conv, norm)
        note = "fused by construction" if why is None else f"stock at present: {why}"
        parts = tuple(self.label(row) for row in rows)
        places = []
        for number, row in enumerate(rows):
            # One call stands for several: they get numbers of their own behind that of the call.
            place = (f"{path}#{index}", number) if number else (path, index)
            self.rows[place] = replace(row, op=op, parts=parts, reason=note)
            places.append(place)
        weight = None if conv is None else id(getattr(conv, "weight", None))
        self.sites.setdefault((id(actual), weight), []).append(places)

    def add_reasons(self, analysis: Analysis) -> None:
        """Calls in no site, seen from the outermost module that shows them."""
        if analysis.match is None or analysis.trace is None:
            return
        for node, reason in analysis.match.reasons.items():
            kind = patterns.kind_of(node, _Modules(analysis.module))
            place = self.place(analysis, node)
            if kind is not None and place not in self.rows:
                row = self.row(analysis, node, kind, "stock")
                self.rows[place] = replace(row, reason=reason)
        if analysis.reason is None:
            return
        for site in analysis.match.sites:
            for node in site.parts:
                place = self.place(analysis, node)
                kind = patterns.kind_of(node, _Modules(analysis.module))
                if kind is not None and place not in self.rows and place[0] == analysis.path:
                    row = self.row(analysis, node, kind, "stock")
                    self.rows[place] = replace(row, reason=analysis.reason)

    def add_unseen(self) -> None:
        """Modules that no trace shows: their caller cannot be traced, or nothing calls them."""
        seen = {row.path for row in self.rows.values()}
        untraceable = {a.path: a.reason for a in self.analyses if a.trace is None}
        for path, module in self.model.named_modules():
            kind = _kind_of_module(module) if is_leaf(module) else None
            if kind is None or path in seen:
                continue
            owner = path.rpartition(".")[0]
            while owner and owner not in untraceable and not _calls(self.analyses, owner):
                owner = owner.rpartition(".")[0]
            reason = untraceable.get(owner)
            whole = self.leaf_above(path)
            if whole is not None:
                why = f"part of {stock_class(self.model.get_submodule(whole)).__name__} {whole}"
            elif reason is not None:
                why = f"the forward of {owner or 'the model'} cannot be traced: {reason}"
            else:
                why = "not called in eval mode"
            row = Row(path, kind, stock_class(module).__name__, "stock", reason=why)
            self.rows[f"{owner}#unseen {path}", 0] = row

    def leaf_above(self, path: str) -> str | None:
        """The module that a module is a part of and that graphs do not look into."""
        parent = path.rpartition(".")[0]
        while parent:
            if is_leaf(self.model.get_submodule(parent)):
                return parent
            parent = parent.rpartition(".")[0]
        return None

    def sorted_rows(self) -> tuple[Row, ...]:
        """By the module whose forward makes the call, in the order of calls."""
        order = {path: i for i, (path, _) in enumerate(self.model.named_modules())}

        def key(place: _Place) -> tuple[int, int, str, int]:
            path, _, call = place[0].partition("#")
            if call.startswith("unseen"):
                return order[path], 1 << 30, call, 0
            index = int(call) if call else place[1]
            return order[path], index, call, place[1]

        return tuple(self.rows[place] for place in sorted(self.rows, key=key))

    # --------------------------------------------------------------------------------- what ran

    def observe(self, example: tuple[Any, ...]) -> None:
        """Run the model on ``example`` and enter the kernels that computed each site."""
        calls: dict[tuple[int, int | None], list[list[Choice]]] = {}
        with (
            _as_before(self.model),
            backends.observe() as choices,
            _current_module() as stack,
            torch.no_grad(),
            _Watch(choices, stack, calls),
        ):
            self.model(*example)
        for key, sites in self.sites.items():
            seen = calls.get(key, [])
            for i, places in enumerate(sites):
                # A site that runs several times in one forward is listed with all its kernels.
                own = seen[i :: len(sites)]
                self.enter(places, [choice for choices in own for choice in choices])

    def enter(self, places: list[_Place], choices: list[Choice]) -> None:
        kernels = ", ".join(dict.fromkeys(c.kernel.full_name for c in choices)) or None
        rejected = tuple(dict.fromkeys(r for c in choices for r in c.rejected))
        for place in places:
            self.rows[place] = replace(self.rows[place], kernel=kernels, rejected=rejected)


class _Modules(dict[str, nn.Module]):
    """Submodules of a module by path, looked up as they are asked for."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, path: str) -> nn.Module:
        return self._root.get_submodule(path)


def _calls(analyses: list[Analysis], path: str) -> bool:
    return any(a.path == path and a.trace is not None for a in analyses)


class _Watch(TorchFunctionMode):
    """Notes whose forward calls which op with which weight, and the choice that is made."""

    def __init__(
        self,
        choices: list[Choice],
        stack: list[nn.Module],
        calls: dict[tuple[int, int | None], list[list[Choice]]],
    ) -> None:
        super().__init__()
        self._choices, self._stack, self._calls = choices, stack, calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "namespace", None) != "fused_resnet":
            return func(*args, **(kwargs or {}))
        before = len(self._choices)
        result = func(*args, **(kwargs or {}))
        weight = None if "add_relu" in str(func) else id(args[1])
        caller = id(self._stack[-1]) if self._stack else 0
        self._calls.setdefault((caller, weight), []).append(self._choices[before:])
        return result


@contextmanager
def _current_module() -> Iterator[list[nn.Module]]:
    """The modules whose forward is running, innermost last, without a hook on any of them."""
    stack: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        stack.pop()

    handles = (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put buffers (running statistics in train mode) and the random state back after the block."""
    before: list[tuple[Tensor, Tensor]] = [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                # Not by version: batch_norm updates its statistics without counting.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
