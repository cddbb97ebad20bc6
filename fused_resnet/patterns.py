"""Which nodes of a graph become one op: conv, batch norm, add, ReLU and max-pooling in a row.

A site is a chain of nodes in which each value has one consumer: the next node. It replaces

    conv (-> norm) (-> ReLU)                         conv_bn_act
    conv (-> norm) (-> ReLU) -> add (-> ReLU)        conv_bn_act with a residual
    conv (-> norm) -> ReLU -> max-pooling            conv_bn_act_maxpool
    add -> ReLU                                      add_relu

Nothing that another part of the graph could observe may change. So no site is made where an
in-place operation writes to memory that is read elsewhere, where an operand would be read later
than before and is written to in between, or where a batch norm would update its statistics in
another order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fused_resnet import functional, nodes
from fused_resnet.fold import (
    activations_of,
    is_frozen_norm,
    is_plain_conv,
    why_not_behind,
    why_not_foldable,
)
from fused_resnet.tracing import INPLACE_OPERATORS, stock_class

Kind = Literal["conv", "norm", "act", "add", "maxpool"]

#: Calls of the package's own functions: fused already.
OWN_FUNCTIONS = frozenset(
    {
        *nodes.FUNCTIONS,
        functional.conv_bn_act,
        functional.conv_bn_act_maxpool,
        functional.add_relu,
        functional.conv_affine_act,
        functional.conv3d_affine_act,
        functional.conv_affine_relu_maxpool,
        torch.ops.fused_resnet.conv_affine_act.default,
        torch.ops.fused_resnet.conv3d_affine_act.default,
        torch.ops.fused_resnet.conv_affine_relu_maxpool.default,
        torch.ops.fused_resnet.add_relu.default,
    }
)

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
_CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
_NORM_FUNCTIONS = (F.batch_norm, torch.batch_norm, F.group_norm, F.layer_norm, F.instance_norm)
_OTHER_ACTS = (
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
)
_OTHER_ACT_FUNCTIONS = (F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, F.mish)


@dataclass
class Site:
    """Nodes that become one call.

    Attributes:
        conv: the convolution; None for a mere add and ReLU.
        norm: the batch norm.
        first_act: the ReLU before the sum.
        add: the sum.
        residual: the operand of ``add`` that is not part of the site.
        act: the last ReLU.
        pool: the max-pooling.
        skipped: ``nn.Identity`` in between.
        inplace: without a convolution: whether sum and ReLU both write to the sum's first operand.
    """

    conv: fx.Node | None = None
    norm: fx.Node | None = None
    first_act: fx.Node | None = None
    add: fx.Node | None = None
    residual: Any = None
    act: fx.Node | None = None
    pool: fx.Node | None = None
    skipped: tuple[fx.Node, ...] = ()
    inplace: bool = False

    @property
    def parts(self) -> list[fx.Node]:
        """The nodes that do something, in the order of computation."""
        chain = (self.conv, self.norm, self.first_act, self.add, self.act, self.pool)
        return [n for n in chain if n is not None]

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes of the site, the identities last."""
        return [*self.parts, *self.skipped]


@dataclass
class Match:
    """Sites of a graph, and why its other convolutions, norms, activations and sums are in none."""

    sites: list[Site] = field(default_factory=list)
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def kind_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Kind | None:
    """What part of a site ``node`` could be, fusable or not; None for all else."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, _ConvNd):
            return "conv"
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm) or (
            is_frozen_norm(stock_class(module))
        ):
            return "norm"
        if isinstance(module, nn.MaxPool2d):
            return "maxpool"
        return "act" if isinstance(module, (nn.ReLU, *_OTHER_ACTS)) else None
    if node.op == "call_method":
        if node.target in ("add", "add_"):
            return "add"
        return "act" if node.target in ("relu", "relu_") else None
    if node.op != "call_function":
        return None
    groups: tuple[tuple[Kind, tuple[Any, ...]], ...] = (
        ("conv", _CONV_FUNCTIONS),
        ("norm", _NORM_FUNCTIONS),
        ("act", _RELU_FUNCTIONS + _OTHER_ACT_FUNCTIONS),
        ("add", _ADD_FUNCTIONS),
        ("maxpool", _POOL_FUNCTIONS),
    )
    return next((kind for kind, functions in groups if node.target in functions), None)


def match(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Match:
    """Find the sites of ``graph``, no node in two of them.

    Args:
        graph: of a traced forward.
        modules: by path, of the traced module.
    """
    return _Matcher(graph, modules).run()


class _Matcher:
    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.memory = _Memory(self.nodes, modules)
        self.claimed: set[fx.Node] = set()
        self.result = Match()

    def run(self) -> Match:
        # Where both operands of a sum are convolutions, the one that stands nearer to it in the
        # code takes it in: the one within fewer submodules, then the later one.
        convs = [node for node in self.nodes if self.kind(node) == "conv"]
        for node in sorted(convs, key=lambda n: (len(n.meta["key"]), -self.order[n])):
            self.conv_site(node)
        for node in self.nodes:
            if self.kind(node) == "add" and node not in self.claimed:
                self.add_site(node)
        for node in self.nodes:
            kind = self.kind(node)
            if kind is not None and node not in self.claimed:
                self.result.reasons.setdefault(node, self.why_alone(node, kind))
        self.result.sites.sort(key=lambda site: self.order[site.parts[0]])
        return self.result

    # ------------------------------------------------------------------------------- kinds of nodes

    def kind(self, node: fx.Node) -> Kind | None:
        return kind_of(node, self.modules)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_relu(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return stock_class(module) is nn.ReLU
        return node.target in _RELU_FUNCTIONS or (
            node.op == "call_method" and node.target in ("relu", "relu_")
        )

    def ends_in_relu(self, norm: nn.Module) -> bool:
        """Whether a norm applies activations of its own, and they are ReLU."""
        own = activations_of(norm)
        return bool(own) and all(stock_class(m) is nn.ReLU for m in own)

    def is_sum(self, node: fx.Node) -> bool:
        """Whether node is the plain sum of two values of the graph."""
        return (
            self.kind(node) == "add"
            and len(node.args) == 2
            and all(isinstance(a, fx.Node) for a in node.args)
            and node.args[0] is not node.args[1]
            and not set(node.kwargs) - {"alpha"}
            and node.kwargs.get("alpha", 1) in (1, 1.0)
        )

    # ----------------------------------------------------------------------------------- the chain

    def consumer(self, node: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
        """The one consumer of node's value, and identities on the way; None if there are more."""
        skipped: tuple[fx.Node, ...] = ()
        while len(node.users) == 1:
            (user,) = node.users
            if user.args[:1] != (node,) and not self.is_sum(user):
                return None, skipped
            module = self.module(user)
            if module is None or stock_class(module) is not nn.Identity:
                return user, skipped
            skipped, node = (*skipped, user), user
        return None, skipped

    def conv_site(self, conv: fx.Node) -> None:
        """Claim the longest chain behind ``conv`` that is safe to fuse."""
        module = self.module(conv)
        if not is_plain_conv(module) or len(conv.args) != 1 or conv.kwargs:
            return
        chains = [Site(conv)]

        def extend(user: fx.Node, skipped: tuple[fx.Node, ...], **parts: Any) -> None:
            last = chains[-1]
            fields = {**vars(last), "skipped": (*last.skipped, *skipped), **parts}
            chains.append(Site(**fields))

        user, skipped = self.consumer(conv)
        relu: fx.Node | None = None  # The one before a pooling or a sum; it may be the norm's own.
        if user is not None and self.kind(user) == "norm":
            norm = self.module(user)
            if norm is None or len(user.args) != 1 or why_not_behind(module, norm) is not None:
                return
            extend(user, skipped, norm=user)
            relu = user if self.ends_in_relu(norm) else None
            user, skipped = (None, ()) if activations_of(norm) and not relu else self.consumer(user)
        if relu is None and user is not None and self.is_relu(user):
            extend(user, skipped, act=user)
            relu = user
            user, skipped = self.consumer(user)
        if relu is not None:
            if user is not None and isinstance(module, nn.Conv2d) and self.poolable(user):
                extend(user, skipped, pool=user)
            elif user is not None and self.may_take(user, relu):
                after, more = self.consumer(user)
                if after is not None and self.is_relu(after):
                    extend(
                        after,
                        (*skipped, *more),
                        first_act=None if relu is chains[-1].norm else relu,
                        add=user,
                        residual=self.other(user, relu),
                        act=after,
                    )
        elif user is not None and self.may_take(user, chains[-1].parts[-1]):
            residual = self.other(user, chains[-1].parts[-1])
            extend(user, skipped, add=user, residual=residual)
            user, skipped = self.consumer(user)
            if user is not None and self.is_relu(user):
                extend(user, skipped, act=user)
        while len(chains) > 1:
            site = chains.pop()
            hazard = self.memory.hazard(site)
            if hazard is None:
                self.claim(site)
                return
            for node in set(site.parts) - set(chains[-1].parts):
                self.result.reasons.setdefault(node, hazard)

    def add_site(self, add: fx.Node) -> None:
        """Claim a sum and the ReLU behind it."""
        if not self.is_sum(add):
            return
        relu, skipped = self.consumer(add)
        if relu is None or not self.is_relu(relu) or relu in self.claimed:
            return
        inplace = bool(self.memory.written(add) and self.memory.written(relu))
        site = Site(add=add, residual=add.args[1], act=relu, skipped=skipped, inplace=inplace)
        hazard = self.memory.hazard(site)
        if hazard is None:
            self.claim(site)
        else:
            self.result.reasons.setdefault(add, hazard)
            self.result.reasons.setdefault(relu, hazard)

    def claim(self, site: Site) -> None:
        self.claimed.update(site.nodes)
        self.result.sites.append(site)
        for node in site.nodes:
            self.result.reasons.pop(node, None)

    def may_take(self, add: fx.Node, operand: fx.Node) -> bool:
        """Whether a convolution that ends in ``operand`` may take the free sum ``add`` in."""
        return self.is_sum(add) and add not in self.claimed and self.other(add, operand) is not None

    def other(self, add: fx.Node, operand: fx.Node) -> fx.Node | None:
        """The operand of a sum that is not ``operand``, nor an identity of it."""
        a, b = add.args
        own = operand
        while own is not a and own is not b:
            own = next(iter(own.users))
        other = b if own is a else a
        assert isinstance(other, fx.Node)
        return other

    def poolable(self, node: fx.Node) -> bool:
        return self.kind(node) == "maxpool" and self.why_not_poolable(node) is None

    def why_not_poolable(self, node: fx.Node) -> str | None:
        module = self.module(node)
        if module is not None:
            return functional.why_not_poolable(module)
        if pool_arguments(node) is None:
            return "the pooling has dilation, ceil_mode or return_indices"
        return None

    # -------------------------------------------------------------------------------- explanations

    def why_alone(self, node: fx.Node, kind: Kind) -> str:
        """Why a node that no site claimed stays as it is."""
        module = self.module(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if kind == "conv":
            if module is None:
                return "called as a function; only modules are fused"
            if not is_plain_conv(module):
                return functional.why_stock(module, None) or ""
            return f"alone: {self.why_no_consumer(node)}"
        if kind == "norm":
            if module is None:
                return "called as a function; only modules are fused"
            reason = why_not_foldable(module)
            if reason is not None:
                return reason
            return f"not behind a convolution: {self.why_no_producer(source)}"
        if kind == "maxpool":
            reason = self.why_not_poolable(node)
            return reason or f"not behind a fused ReLU: {self.why_no_producer(source)}"
        if kind == "add":
            if not self.is_sum(node):
                return "not a plain sum of two tensors"
            return "neither behind a convolution of its own nor before a ReLU"
        if not self.is_relu(node):
            name = type(module).__name__ if module is not None else function_name(node)
            return f"{name} is no ReLU; it runs behind the fused rest"
        return f"not behind a convolution or a sum: {self.why_no_producer(source)}"

    def why_no_consumer(self, node: fx.Node) -> str:
        if not node.users:
            return "its result is not used"
        if len(node.users) > 1:
            return f"its result is used {len(node.users)} times ({_names(node.users)})"
        (user,) = node.users
        if self.kind(user) == "norm" and (norm := self.module(user)) is not None:
            reason = why_not_behind(self.module(node), norm)
            if reason is not None:
                return reason
        return f"followed by {self.describe(user)}"

    def why_no_producer(self, source: fx.Node | None) -> str:
        if source is None:
            return "its input is no tensor of the graph"
        if len(source.users) > 1 and self.kind(source) in ("conv", "norm", "add", "act"):
            return (
                f"the result of {self.describe(source)} is used {len(source.users)} times "
                f"({_names(source.users)})"
            )
        return f"its input is {self.describe(source)}"

    def describe(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"the argument {node.target}"
        if node.op == "output":
            return "the end of forward"
        if node.op == "call_module":
            return f"{stock_class(self.modules[str(node.target)]).__name__} {node.target}"
        return function_name(node)


def pool_arguments(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """(kernel, stride, padding) of a call of ``max_pool2d``; None if it is given others."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    extras = given.get("dilation", 1), given.get("ceil_mode"), given.get("return_indices")
    kernel, stride, padding = (given.get(n) for n in names[1:4])
    values = [tuple(v) if isinstance(v, list | tuple) else v for v in (kernel, stride, padding)]
    if extras[0] not in (1, (1, 1), [1, 1]) or extras[1] or extras[2]:
        return None
    if not all(v is None or isinstance(v, int | tuple) for v in values) or not isinstance(
        given.get("input"), fx.Node
    ):
        return None
    return values[0], values[1] or values[0], values[2] or 0


def function_name(node: fx.Node) -> str:
    """The name of the function or method that ``node`` calls."""
    return node.target if isinstance(node.target, str) else node.target.__name__


def _names(found: Any) -> str:
    return ", ".join("the result" if n.op == "output" else n.name for n in found)


# --------------------------------------------------------------------------------------------------
# Memory: who may share storage with whom, and who writes.
# --------------------------------------------------------------------------------------------------

_FRESH_MODULES = (_ConvNd, _NormBase, nn.GroupNorm, nn.Linear, nn.MaxPool2d, nn.AvgPool2d)
_FRESH_METHODS = ("add", "clone", "div", "mean", "mul", "relu", "sigmoid", "sub", "sum", "tanh")
_FRESH_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        torch.add,
        torch.mul,
        torch.cat,
        torch.relu,
        F.conv2d,
        F.max_pool2d,
        torch.max_pool2d,
        F.avg_pool2d,
    }
    | OWN_FUNCTIONS
)
_INPLACE_FUNCTIONS = frozenset({*INPLACE_OPERATORS, operator.setitem, torch.relu_})


class _Memory:
    """Storage that the values of a graph may share, and the checks that rest on it."""

    def __init__(self, nodes: list[fx.Node], modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.nodes = nodes
        self.order = {node: i for i, node in enumerate(nodes)}
        # The nodes in whose memory a value may lie; placeholders and parameters stand for the
        # outside.
        self.origins: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in nodes:
            inherited: frozenset[fx.Node] = frozenset()
            if not self.is_fresh(node):
                # An in-place operation returns what it wrote to; anything else may return any
                # argument.
                writes = node.op in ("call_function", "call_method") and self.written(node)
                sources = writes or node.all_input_nodes
                inherited = inherited.union(*(self.origins[a] for a in sources))
            self.origins[node] = inherited | {node}

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether node's value certainly lies in memory that no other value has."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if is_frozen_norm(stock_class(module)):
                return True
            inplace = getattr(module, "inplace", False)
            return isinstance(module, (*_FRESH_MODULES, nn.ReLU)) and not inplace
        if node.op == "call_method":
            return node.target in _FRESH_METHODS
        if node.target is F.relu:
            return not (node.kwargs.get("inplace", False) or any(a is True for a in node.args))
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS

    def written(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that node may write to."""
        inputs = node.all_input_nodes
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, (*_FRESH_MODULES, nn.Identity)) or self.is_fresh(node):
                return []
            if stock_class(module).__module__.startswith("torch.nn."):
                return inputs[:1] if getattr(module, "inplace", False) else []
            return inputs
        if node.op == "call_method":
            name = str(node.target)
            return inputs[:1] if name.endswith("_") and not name.endswith("__") else []
        if node.op != "call_function" or node.target in OWN_FUNCTIONS:
            return []
        if "out" in node.kwargs:
            return inputs
        named_so = getattr(node.target, "__name__", "").endswith("_")
        inplace = node.kwargs.get("inplace", False) or (
            node.target is F.relu and any(a is True for a in node.args)
        )
        writes = node.target in _INPLACE_FUNCTIONS or named_so or inplace
        return inputs[:1] if writes else []

    def share(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two values may lie in the same memory."""
        if self.origins[a] & self.origins[b]:
            return True
        # Two arguments of forward may be one tensor, or views of one.
        return self.is_outside(a) and self.is_outside(b)

    def is_outside(self, node: fx.Node) -> bool:
        """Whether a value may lie in memory that the caller or a parameter has."""
        return any(n.op in ("placeholder", "get_attr") for n in self.origins[node])

    def hazard(self, site: Site) -> str | None:
        """What could be observed if ``site`` were one op; None if nothing."""
        members = set(site.nodes)
        first, last = self.order[site.parts[0]], self.order[site.parts[-1]]
        for node in site.parts:
            for target in self.written(node):
                # add_relu writes in place itself, so only what happens in between counts.
                end = last if site.inplace else len(self.nodes)
                if end == last and node is site.act:
                    continue
                reason = self.seen_elsewhere(node, target, members, end)
                if reason is not None:
                    return reason
        between = [n for n in self.nodes[first + 1 : last] if n not in members]
        if site.add is not None:
            # The operands are read where the site's last node stands.
            source = site.parts[0].args[0] if site.conv is not None else site.add.args[0]
            for node in between:
                after_add = self.order[node] > self.order[site.add]
                for target in self.written(node):
                    if isinstance(source, fx.Node) and self.share(target, source):
                        return f"{node.name} writes to the input of {site.parts[0].name} in between"
                    if after_add and self.share(target, site.residual):
                        return f"{node.name} writes to the residual in between"
        if site.norm is not None:
            for node in between:
                if node.op == "call_module" and node.target == site.norm.target:
                    return f"{node.name} calls the same batch norm in between"
        return None

    def seen_elsewhere(
        self, writer: fx.Node, target: fx.Node, members: set[fx.Node], end: int
    ) -> str | None:
        """Who could see, before ``end``, that ``writer`` no longer writes to ``target``."""
        if end == len(self.nodes) and self.is_outside(target):
            return f"{writer.name} writes into memory that the caller or a parameter has"
        position = self.order[writer]
        for node in self.nodes[:position]:
            if node in members or not self.share(node, target):
                continue
            for user in node.users:
                if user not in members and position < self.order[user] < end:
                    return f"{writer.name} writes to a value that {user.name} reads later"
        return None
