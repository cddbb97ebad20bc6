"""Bottleneck networks cut just before each 3x3 convolution: find the chains, and run them.

A bottleneck network is usually cut at every convolution. Cut before each 3x3 only, one kernel
computes 3x3, 1x1, sum and the next block's 1x1 (`functional.bottleneck_chain`), and the 3x3's own
result never reaches memory. `find_chains` looks for blocks where that is possible in any model
whose forward can be traced, and says of the others why not; `chain` gives a model that does it.

It pays on GPUs, where Triton kernels exist; elsewhere stock operations compute the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fused_resnet import backends, functional, hooks, nodes, patterns, tracing
from fused_resnet.fold import affine_of, uses_batch_statistics, weight_of
from fused_resnet.fuse import _mode, _rewrite, clone, reject_unsupported, restore_classes
from fused_resnet.patterns import Site
from fused_resnet.problem import ChainProblem
from fused_resnet.tracing import Trace, Untraceable

#: A convolution and its norm, by the paths of the modules.
Pair = tuple[str, str | None]


@dataclass(frozen=True)
class Link:
    """One bottleneck, computed from its 3x3 convolution on by one call.

    Attributes:
        path: of the 3x3 convolution.
        conv2: the 3x3.
        conv3: the 1x1 behind it, whose sum with the shortcut ends the block.
        projection: the 1x1 in the shortcut, None for an identity.
        following: the next block's first 1x1, None where it is computed by itself.
        stride: of the 3x3.
        store: what is kept of the block's output: ``all``, ``even`` pixels, ``pool`` (its mean).
        notes: why the link does not reach further.
    """

    path: str
    conv2: Pair
    conv3: Pair
    projection: Pair | None
    following: Pair | None
    stride: int
    store: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Bottlenecks each of which computes the next one's first activation; or one that cannot.

    Attributes:
        links: in order; none if the block at ``path`` cannot be chained.
        path: of the first 3x3 convolution.
        reason: why there are no links.
    """

    links: tuple[Link, ...]
    path: str
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.path}: not chained, {self.reason}"
        end = self.links[-1]
        kept = [f"{ln.path} {ln.store}" for ln in self.links if ln.store != "all"]
        text = f"{self.path} to {end.path}: {len(self.links)} bottlenecks"
        text += f", stored thinned or pooled: {', '.join(kept)}" if kept else ""
        notes = [f"{ln.path}: {note}" for ln in self.links for note in ln.notes]
        return "; ".join([text, *notes])


@dataclass(frozen=True)
class _Layer:
    """A convolution with norm, residual and ReLU in a graph; ``entry`` reads x, ``out`` is made."""

    path: str
    conv: nn.Conv2d
    norm: str | None
    entry: fx.Node
    out: fx.Node
    relu: bool
    residual: int | None  # Its position among the arguments of ``add``.
    add: fx.Node | None
    site: Site | None
    hooked: str | None  # A module of it that has hooks.

    @property
    def x(self) -> Any:
        return self.entry.args[0]

    @property
    def shortcut(self) -> Any:
        assert self.add is not None
        assert self.residual is not None
        return self.add.args[self.residual]

    @property
    def pair(self) -> Pair:
        return self.path, self.norm

    def is_1x1(self, stride: int | None = None) -> bool:
        """Whether it is a plain 1x1 convolution, of this stride if one is given."""
        c = self.conv
        return (
            c.kernel_size == (1, 1)
            and c.padding == (0, 0)
            and c.groups == 1
            and c.stride[0] == c.stride[1]
            and stride in (None, c.stride[0])
        )


@dataclass
class _Block:
    """A bottleneck that can be a link."""

    conv2: _Layer
    conv3: _Layer
    projection: _Layer | None
    following: _Layer | None = None
    store: str = "all"
    pool: fx.Node | None = None
    notes: list[str] = field(default_factory=list)

    def link(self) -> Link:
        return Link(
            path=self.conv2.path,
            conv2=self.conv2.pair,
            conv3=self.conv3.pair,
            projection=None if self.projection is None else self.projection.pair,
            following=None if self.following is None else self.following.pair,
            stride=int(self.conv2.conv.stride[0]),
            store=self.store,
            notes=tuple(self.notes),
        )


def find_chains(model: nn.Module) -> list[Chain]:
    """Which bottlenecks of ``model`` can be chained, and why others cannot.

    Args:
        model: stock, fused, or one of this package's own; it is left as it is.

    Returns:
        Chains in the order of computation. Each bottleneck that cannot be chained is a chain of no
        links, with the reason.

    Raises:
        Untraceable: the forward of the model is not a graph; the message says why.
        TypeError: as `fuse`.
        ValueError: as `fuse`.

    Example:
        >>> for found in fused_resnet.find_chains(torchvision.models.resnet50()):
        ...     print(found)
    """
    return _Search(_stock(model)).chains()


def chain(model: nn.Module, device: torch.device | None = None) -> ChainedModel:
    """A model for inference that computes its bottlenecks in chains, and all else as `fuse` does.

    It shares parameters and buffers with ``model`` and follows their changes. Hooks that are
    registered later are not seen. Whether it is quicker is for measurements on your GPU to say.

    Args:
        model: in eval mode; left as it is.
        device: chain only what has a kernel there; by default where the model is. On a CPU
            everything is chained.

    Raises:
        Untraceable: the forward of the model is not a graph.
        ValueError: nothing can be chained; the message says why. Or as `fuse`.
        TypeError: as `fuse`.

    Example:
        >>> chained = fused_resnet.chain(model.eval())
        >>> with torch.inference_mode():
        ...     y = chained(images)
    """
    search = _Search(_stock(model))
    first = next(model.parameters(), torch.empty(0))
    search.restrict(first.device if device is None else torch.device(device), first.dtype)
    if not search.blocks:
        why = "; ".join(dict.fromkeys(search.refused.values())) or "it has no bottlenecks"
        raise ValueError(f"nothing of {type(model).__name__} can be chained: {why}")
    return ChainedModel(search, device)


class ChainedModel(nn.Module):
    """What `chain` makes: a graph of fused calls. Its forward takes the model's tensors in order.

    Attributes:
        chains: what is chained, as `find_chains` describes it.
    """

    def __init__(self, search: _Search, device: torch.device | None = None) -> None:
        super().__init__()
        # In a tuple, so that the model's parameters are not listed twice.
        self._source = search.model, device
        self.chains = search.chains()
        trace = search.trace
        search.rewrite()
        self._inputs, self._structure = tuple(trace.inputs), trace.structure
        self.body = fx.GraphModule(search.model, trace.graph)
        self.eval()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of the model; the graph is made anew."""
        return chain, self._source

    def unchained(self) -> nn.Module:
        """The model that it was made from, fused nowhere; all parameters and buffers are shared.

        Raises:
            RuntimeError: there are hooks on the chained model, which the other has not.
            ValueError: in train mode.
        """
        if self.training:
            raise ValueError("a chained model is for inference, but it is in train mode")
        if any(hooks.is_on(module) for module in (self, self.body)):
            raise RuntimeError("a chained model with hooks has none of them when it is unchained")
        return self._source[0]

    def forward(self, *inputs: Any) -> Any:
        """The model's result.

        Raises:
            TypeError: another number of inputs than the model takes.
            RuntimeError: in train mode, or where gradients are asked for.
        """
        if len(inputs) != len(self._inputs):
            raise TypeError(f"takes {', '.join(self._inputs)}, got {len(inputs)} inputs")
        result = self.body(*inputs)
        if self._structure is not None:
            return pytree.tree_unflatten(result, self._structure)
        return result


def run_link(
    mid: Tensor,
    shortcut: Tensor,
    conv2: nn.Conv2d,
    norm2: nn.Module | None,
    conv3: nn.Conv2d,
    norm3: nn.Module | None,
    projection: nn.Conv2d | None,
    norm_projection: nn.Module | None,
    following: nn.Conv2d | None,
    norm_following: nn.Module | None,
    inside: bool,
    store: str,
) -> tuple[Tensor, Tensor]:
    """One link from its modules: `functional.bottleneck_chain` with folded norms.

    Args:
        mid: [N, M, H, W], the input of the 3x3.
        shortcut: the residual, or the projection's input, thinned out or not.
        conv2: the 3x3.
        norm2: its norm.
        conv3: the 1x1 behind it.
        norm3: its norm.
        projection: the 1x1 in the shortcut, or None.
        norm_projection: its norm.
        following: the next block's 1x1, or None.
        norm_following: its norm.
        inside: whether the projection is computed within the kernel.
        store: as in `functional.bottleneck_chain`.

    Raises:
        RuntimeError: a norm is in train mode.
    """
    for norm in (norm2, norm3, norm_projection, norm_following):
        if uses_batch_statistics(norm):
            raise RuntimeError("chained bottlenecks are for inference: call .eval() first")

    def triple(
        conv: nn.Conv2d | None, norm: nn.Module | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        return None if conv is None else (weight_of(conv), *affine_of(conv, norm))

    stride = int(conv2.stride[0])
    projected = triple(projection, norm_projection)
    if projected is not None and not inside:
        step = stride if shortcut.shape[2:] == mid.shape[2:] else 1
        shortcut = functional.conv_affine_act(shortcut, *projected, stride=step, epilogue="none")
        projected = None
    second, third = triple(conv2, norm2), triple(conv3, norm3)
    assert second is not None
    assert third is not None
    return functional.bottleneck_chain(
        mid,
        shortcut,
        second,
        third,
        projection=projected,
        following=triple(following, norm_following),
        stride=stride,
        store=store,
    )


#: Arguments by which fused calls ask for epilogues that bottlenecks do not have.
_OTHER_EPILOGUES = ("act_before_add", "first_act", "residual", "bn", "act")


def _is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def _stock(model: nn.Module) -> nn.Module:
    """The model in stock classes, sharing all tensors, in eval mode."""
    reject_unsupported(model)
    plain = clone(model)
    restore_classes(plain)
    return plain.eval()


class _Search:
    """The graph of a model, its bottlenecks, and what of them can be chained."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        with _mode(model, training=False), torch.no_grad():
            self.trace: Trace = tracing.trace(model)
        self.modules = dict(model.named_modules())
        self._drop_identities()
        self.match = patterns.match(self.trace.graph, self.modules)
        self.layers = self._layers()
        self.made = {layer.out: layer for layer in self.layers}
        self.blocks: list[_Block] = []
        self.refused: dict[str, str] = {}
        self.inside: dict[str, bool] = {}
        self._find()
        self._connect()

    def _drop_identities(self) -> None:
        """Take modules that do nothing out of the graph, as timm's blocks have many."""
        graph = self.trace.graph
        for node in list(graph.nodes):
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if type(module) is nn.Identity and not hooks.is_on(module) and len(node.args) == 1:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    # ------------------------------------------------------------------------------------- layers

    def _layers(self) -> list[_Layer]:
        """Every convolution of a kind that a bottleneck consists of, in the order of the graph."""
        found = [layer for site in self.match.sites if (layer := self._of_site(site)) is not None]
        for node in self.trace.graph.nodes:
            layer = self._of_call(node)
            if layer is not None:
                found.append(layer)
        order = {node: i for i, node in enumerate(self.trace.graph.nodes)}
        return sorted(found, key=lambda layer: order[layer.out])

    def _of_site(self, site: Site) -> _Layer | None:
        conv, norm = site.conv, site.norm
        if conv is None or conv.op != "call_module" or site.first_act or site.pool:
            return None
        if norm is not None and norm.op != "call_module":
            return None
        residual = None
        if site.add is not None:
            residual = 0 if site.residual is site.add.args[0] else 1
        module = self.modules[str(conv.target)]
        if not isinstance(module, nn.Conv2d):
            return None
        path = None if norm is None else str(norm.target)
        return _Layer(
            path=str(conv.target),
            conv=module,
            norm=path,
            entry=conv,
            out=site.parts[-1],
            relu=site.act is not None,
            residual=residual,
            add=site.add,
            site=site,
            hooked=self._hooked(*(str(n.target) for n in site.parts if n.op == "call_module")),
        )

    def _of_call(self, node: fx.Node) -> _Layer | None:
        """A layer that the model's own forward computes by a fused call."""
        if node.target not in (functional.conv_bn_act, nodes.conv_bn_act):
            return None
        _, conv, norm, act, residual = (*node.args, None, None, None)[:5]
        # Both functions are recorded with all of these by position.
        if any(node.kwargs.get(name) for name in _OTHER_EPILOGUES) or not isinstance(conv, fx.Node):
            return None
        module = self.model.get_submodule(str(conv.target))
        if isinstance(act, fx.Node):
            relu = isinstance(self.model.get_submodule(str(act.target)), nn.ReLU)
        else:
            relu = isinstance(act, str)
        if not isinstance(module, nn.Conv2d) or (act is not None and not relu):
            return None
        path = str(norm.target) if isinstance(norm, fx.Node) else None
        return _Layer(
            path=str(conv.target),
            conv=module,
            norm=path,
            entry=node,
            out=node,
            relu=relu,
            residual=None if residual is None else 4,
            add=None if residual is None else node,
            site=None,
            hooked=self._hooked(
                *(str(n.target) for n in (conv, norm, act) if isinstance(n, fx.Node))
            ),
        )

    def _hooked(self, *paths: str) -> str | None:
        """The first of these modules that has a hook."""
        found = (p for p in paths if hooks.is_on(self.model.get_submodule(p)))
        return next(found, None)

    # ------------------------------------------------------------------------------------- blocks

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        return list(node.users)

    def _find(self) -> None:
        """Bottlenecks, by their 3x3 convolutions."""
        for layer in self.layers:
            if layer.conv.kernel_size != (3, 3):
                continue
            before = self.made.get(layer.x)
            behind = [ly for ly in self.layers if ly.x is layer.out]
            narrow = before is not None and before.conv.kernel_size == (1, 1)
            if not narrow and not any(ly.is_1x1() and ly.add is not None for ly in behind):
                continue  # Not a bottleneck at all.
            reason = self._why_not(layer, behind)
            if reason is None:
                self.blocks.append(_Block(layer, behind[0], self._projection(layer, behind[0])))
            else:
                self.refused[layer.path] = reason
        seen = {layer.path for layer in self.layers}
        for node in self.trace.graph.nodes:
            if node.op != "call_module":
                continue
            path, module = str(node.target), self.modules[str(node.target)]
            opaque = self.trace.opaque.get(node.meta.get("key", ()))
            if opaque is not None and any(map(_is_3x3, module.modules())):
                self.refused[path] = opaque
            elif path not in seen and _is_3x3(module) and self._behind_1x1(node):
                self.refused[path] = self.match.reasons.get(node, "it is not part of a fused call")

    def _behind_1x1(self, node: fx.Node) -> bool:
        """Whether the convolution before ``node``, past norms and activations, is a 1x1."""
        while node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                return module.kernel_size == (1, 1)
            if node in self.made:
                return self.made[node].conv.kernel_size == (1, 1)
            if len(node.args) != 1:
                return False
        return False

    def _why_not(self, layer: _Layer, behind: Sequence[_Layer]) -> str | None:
        """Why a 3x3 convolution does not begin a link, or None."""
        c = layer.conv
        if c.groups != 1:
            return (
                f"its 3x3 has {c.groups} groups, and the chained kernel multiplies dense matrices"
            )
        if c.dilation != (1, 1) or c.padding != (1, 1):
            return f"its 3x3 has dilation {c.dilation} and padding {c.padding}, not 1 and 1"
        if c.stride[0] != c.stride[1] or c.padding_mode != "zeros":
            return "its 3x3 has uneven strides, or pads with something other than zeros"
        if c.in_channels != c.out_channels:
            return f"its 3x3 changes the channels, from {c.in_channels} to {c.out_channels}"
        if not layer.relu or layer.add is not None:
            return "its 3x3 is not followed by a norm and a ReLU alone"
        readers = self._readers(layer.out)
        if len(readers) != 1 or not behind:
            what = ", ".join(sorted(self._name(node) for node in readers))
            return f"the result of its 3x3 is read by {what or 'nobody'}, not just by a 1x1"
        last = behind[0]
        if hooked := layer.hooked or last.hooked:
            return f"a hook on {hooked} needs a tensor that would not be stored"
        if not last.is_1x1(1):
            return "its 3x3 is not followed by a plain 1x1"
        if last.add is None or not last.relu:
            return "its last 1x1 is not followed by a sum with the shortcut and a ReLU"
        if not isinstance(last.shortcut, fx.Node):
            return "its shortcut is not a tensor"
        return None

    def _name(self, node: fx.Node) -> str:
        return "the model's output" if node.op == "output" else str(node.target)

    def _projection(self, conv2: _Layer, conv3: _Layer) -> _Layer | None:
        """The 1x1 in the shortcut, if the kernel may compute it."""
        found = self.made.get(conv3.shortcut)
        if found is None or found.relu or found.add is not None or found.hooked:
            return None
        if len(found.out.users) != 1:
            return None
        # Its input must be known to be as large as the 3x3's: that of the block's first 1x1.
        first = self.made.get(conv2.x)
        if first is None or not first.is_1x1(1) or first.x is not found.x:
            return None
        return found if found.is_1x1(int(conv2.conv.stride[0])) else None

    def _connect(self) -> None:
        """Each block's successor, and what has to be stored of its output."""
        begins = {block.conv2.x: block for block in self.blocks}
        for block in self.blocks:
            out = block.conv3.out
            readers = self._readers(out)
            firsts = [ly for ly in self.layers if ly.x is out and ly.relu and ly.add is None]
            first = next((ly for ly in firsts if ly.conv.kernel_size == (1, 1)), None)
            if first is None:
                self._end(block, readers)
                continue
            after = begins.get(first.out)
            if first.hooked:
                block.notes.append(f"a hook on {first.hooked} needs what comes before it")
                continue
            if not first.is_1x1(1):
                block.notes.append(
                    f"the next block's 1x1 has stride {first.conv.stride[0]} (ResNet v1)"
                )
                continue
            if after is None:
                block.notes.append("the next block is not chained")
                continue
            block.following = first
            thin = after.projection
            if thin is None or thin.conv.stride != (2, 2):
                continue
            others = [n for n in readers if n not in (first.entry, thin.entry)]
            if others:
                what = ", ".join(map(self._name, others))
                block.notes.append(f"all pixels are stored, since {what} reads them")
            else:
                block.store = "even"

    def _end(self, block: _Block, readers: list[fx.Node]) -> None:
        """The last block of a network, whose output may be pooled at once."""
        if len(readers) == 1 and readers[0].op == "call_module":
            pool = self.modules[str(readers[0].target)]
            once = isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))
            if once and not hooks.is_on(pool):
                block.store, block.pool = "pool", readers[0]

    def chains(self) -> list[Chain]:
        """Runs of blocks, and the refused ones, by the order of 3x3 convolutions in the model."""
        groups: list[list[_Block]] = []
        open_group: dict[fx.Node, list[_Block]] = {}
        for block in self.blocks:
            group = open_group.pop(block.conv2.x, None)
            if group is None:
                group = []
                groups.append(group)
            group.append(block)
            if block.following is not None:
                open_group[block.following.out] = group
        found = [Chain(tuple(b.link() for b in g), g[0].conv2.path) for g in groups]
        found += [Chain((), path, reason) for path, reason in self.refused.items()]
        order = {path: i for i, path in enumerate(self.modules)}
        return sorted(found, key=lambda c: order[c.path])

    # ------------------------------------------------------------------------------- restriction

    def restrict(self, device: torch.device, dtype: torch.dtype) -> None:
        """Leave out what no kernel of the device computes; a CPU computes everything."""
        self.inside = {block.conv2.path: True for block in self.blocks}
        if device.type == "cpu":
            return
        for block in list(self.blocks):
            # A projection outside first, then a chain that ends here: in the order of their cost.
            reason: str | None = None
            for inside, following in ((True, True), (False, True), (True, False), (False, False)):
                reason = self._no_kernel(block, inside, following, device, dtype)
                if reason is None:
                    self.inside[block.conv2.path] = inside
                    if not following:
                        block.following, block.store = None, "all"
                    break
            if reason is not None:
                self.blocks.remove(block)
                self.refused[block.conv2.path] = reason
        # What was left out can no longer follow.
        begins = {block.conv2.x for block in self.blocks}
        for block in self.blocks:
            if block.following is not None and block.following.out not in begins:
                block.following, block.store = None, "all"
                block.notes.append("the next block is not chained on this device")

    def _no_kernel(
        self, block: _Block, inside: bool, following: bool, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Why only stock torch would compute a block, whatever the size of its images."""
        m, k = block.conv2.conv.in_channels, block.conv3.conv.out_channels
        stride = int(block.conv2.conv.stride[0])
        after = block.following.conv.out_channels if following and block.following else 0
        proj = block.projection.conv.in_channels if inside and block.projection else 0
        store = "all" if block.store == "even" and not following else block.store
        step = stride if proj else 1
        problem = ChainProblem(1, m, 16, 16, k, after, proj, stride, step, store, dtype)
        reasons = [
            kernel.supports(problem, device)
            for kernel in backends.KERNELS
            if kernel.op == "bottleneck_chain" and kernel.backend != "torch"
        ]
        if None in reasons:
            return None
        return reasons[0] if reasons else "no backend chains bottlenecks"

    # ---------------------------------------------------------------------------------- rewriting

    def rewrite(self) -> None:
        """Put links and fused calls into the graph."""
        graph = self.trace.graph
        mine = {
            id(ly.site)
            for block in self.blocks
            for ly in (block.conv2, block.conv3, block.projection, block.following)
            if ly is not None
        }
        _rewrite(graph, tuple(site for site in self.match.sites if id(site) not in mine))
        for block in self.blocks:
            last = block.conv3.out
            with graph.inserting_before(last):
                pairs = []
                for layer in (block.conv2, block.conv3, block.projection, block.following):
                    paths = (None, None) if layer is None else layer.pair
                    for path in paths:
                        node = None if path is None else graph.create_node("get_attr", path)
                        pairs.append(node)
                shortcut = block.conv3.shortcut
                if block.projection is not None:
                    shortcut = block.projection.x
                inside = self.inside.get(block.conv2.path, True)
                arguments = (block.conv2.x, shortcut, *pairs, inside, block.store)
                call = graph.call_function(run_link, arguments)
                out = graph.call_function(operator.getitem, (call, 0))
                mid_next = graph.call_function(operator.getitem, (call, 1))
            last.replace_all_uses_with(out)
            if block.following is not None:
                block.following.out.replace_all_uses_with(mid_next)
            if block.pool is not None:
                block.pool.replace_all_uses_with(out)
        # Only what a link computes now is dead; norms and in-place activations among it.
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        graph.lint()


__all__ = ["Chain", "ChainedModel", "Link", "Untraceable", "chain", "find_chains", "run_link"]
