"""Bottlenecks among the layers of a graph: which can be chained, how, and the layers that result.

A chained call (`fused_resnet::bottleneck_chain`) computes a bottleneck from its 3x3 on, and may
take in the projection of the shortcut and the next block's first 1x1. It never takes anything that
the next call would want to compute, so every bottleneck is a choice of its own, with one exception:
a call that stores only the even pixels of its output changes what the next projection reads.

What a call computes without storing it must be nobody else's: a 3x3's result that the model
returns, or that anything else reads, keeps its bottleneck unchained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch

from fused_resnet.graph import Meta, refs_in, rewritten
from fused_resnet.layers import Chained, Conv, Layer, Layers, Plain, Span
from fused_resnet.problem import ChainProblem


@dataclass(frozen=True)
class Bottleneck:
    """A bottleneck that a chained call can compute.

    Attributes:
        conv2: the 3x3.
        conv3: the 1x1 behind it, with the sum and the ReLU.
        projection: the 1x1 in the shortcut, if it can be part of the call.
        following: the next block's first 1x1, if it can be part of the call.
        thinning: the strided 1x1 that is the only other reader of the output, if there is one: it
            sees even pixels only.
        pool: the mean over pixels that is the only reader of the output, if there is one.
        notes: why the call cannot reach further.
    """

    conv2: Conv
    conv3: Conv
    projection: Conv | None
    following: Conv | None
    thinning: Conv | None
    pool: Plain | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Path of the 3x3."""
        return self.conv2.name

    def spans(self) -> list[Span]:
        """Every way to chain it, the one that takes in most first."""
        found: list[Span] = []
        for following in (True, False) if self.following is not None else (False,):
            stores: tuple[str, ...] = ("all",)
            if following and self.thinning is not None:
                stores = ("even", "all")
            elif not following and self.pool is not None:
                stores = ("pool", "all")
            inside = (True, False) if self.projection is not None else (False,)
            pairs = itertools.product(stores, inside)
            found += [Span(self.conv2.result, following, p, store) for store, p in pairs]
        return found

    def call(self, span: Span, thin: bool) -> Chained:
        """The call of a span.

        Args:
            span: of this bottleneck.
            thin: whether all that is left of the projection's input are the even pixels.
        """
        conv2, conv3, pool = self.conv2, self.conv3, self.pool if span.store == "pool" else None
        inside = self.projection if span.projection else None
        if inside is not None and thin:
            inside = thinned(inside)
        after = self.following if span.following else None
        parts = tuple(part for part in (conv2, inside, conv3, after, pool) if part is not None)
        weights: list[int | None] = []
        for conv in (conv2, conv3, inside, after):
            weights += (None, None, None) if conv is None else conv.constants
        p = conv2.problem
        shortcut = conv3.residual if inside is None else inside.x
        assert shortcut is not None
        return Chained(
            name=" + ".join(part.name for part in parts),
            op="bottleneck_chain",
            problem=ChainProblem(
                p.n, p.c, p.h, p.w,
                k=conv3.problem.k,
                next=0 if after is None else after.problem.k,
                proj=0 if inside is None else inside.problem.c,
                stride=p.stride[0],
                step=1 if inside is None else inside.problem.stride[0],
                store=span.store,
                dtype=p.dtype,
            ),
            result=conv3.result if pool is None else pool.result,
            mid_next=None if after is None else after.result,
            x=conv2.x,
            shortcut=shortcut,
            weights=tuple(weights),
            block=conv2.result,
            ends=conv3.result,
            parts=parts,
        )  # fmt: skip


def thinned(conv: Conv) -> Conv:
    """A 1x1 of stride 2 that finds the even pixels of its input only."""
    p = conv.problem
    h, w = (p.h + 1) // 2, (p.w + 1) // 2
    return replace(conv, problem=replace(p, h=h, w=w, stride=(1, 1), x_channels_last=True))


@dataclass(frozen=True)
class Found:
    """What `find` found.

    Attributes:
        blocks: bottlenecks that can be chained, in order.
        refused: (path of the 3x3, reason) of those that cannot.
    """

    blocks: tuple[Bottleneck, ...]
    refused: tuple[tuple[str, str], ...]


def find(layers: Layers) -> Found:
    """The bottlenecks of a graph none of whose layers are chained."""
    return _Search(layers).found()


class _Search:
    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.made = {layer.result: layer for layer in layers.layers}
        self.readers: dict[int, list[Layer]] = {}
        for layer in layers.layers:
            for value in layer.reads:
                self.readers.setdefault(value, []).append(layer)
        self.returned = set(refs_in(layers.graph.outputs))
        self.rewritten = rewritten(layers.source)

    def found(self) -> Found:
        blocks, refused = [], []
        for layer in self.layers.layers:
            if not isinstance(layer, Conv) or (layer.problem.r, layer.problem.s) != (3, 3):
                continue
            before = self.made.get(layer.x)
            narrow = isinstance(before, Conv) and (before.problem.r, before.problem.s) == (1, 1)
            behind = self._behind(layer)
            if not narrow and behind is None:
                continue  # No bottleneck at all.
            reason = self._why_not(layer, behind)
            if reason is None:
                assert behind is not None
                blocks.append(self._block(layer, behind))
            else:
                refused.append((layer.name, reason))
        return Found(tuple(blocks), tuple(refused))

    def _behind(self, conv2: Conv) -> Conv | None:
        """The 1x1 that ends the bottleneck of a 3x3."""
        for layer in self.readers.get(conv2.result, ()):
            if _is_1x1(layer) and layer.x == conv2.result and layer.residual is not None:
                return layer
        return None

    def _why_not(self, conv2: Conv, conv3: Conv | None) -> str | None:
        p = conv2.problem
        if p.groups != 1:
            return f"its 3x3 has {p.groups} groups"
        if p.dilation != (1, 1):
            return f"its 3x3 has dilation {max(p.dilation)}"
        if p.padding != (1, 1) or p.stride[0] != p.stride[1]:
            return f"its 3x3 has padding {p.padding} and stride {p.stride}"
        if p.pool is not None or p.epilogue != "relu":
            return "its 3x3 does not end in a ReLU alone"
        if p.k != p.c:
            return f"its 3x3 turns {p.c} channels into {p.k}"
        if conv2.result in self.returned:
            return "the model returns the result of its 3x3"
        others = [r for r in self.readers.get(conv2.result, ()) if r is not conv3]
        if others:
            what = "needs the result of its 3x3" if conv3 is not None else "follows its 3x3"
            return f"{', '.join(dict.fromkeys(r.name for r in others))} {what}"
        if conv3 is None:
            return "nothing reads the result of its 3x3"
        if conv3.problem.epilogue != "add_relu":
            return "its sum with the shortcut does not end in a ReLU alone"
        values = (conv2.x, conv2.result, conv3.residual, conv3.result)
        if any(value in self.rewritten for value in values):
            return "what it reads or makes is changed in place"
        return None

    def _block(self, conv2: Conv, conv3: Conv) -> Bottleneck:
        notes: list[str] = []
        following = self._following(conv3, notes)
        thinning = None if following is None else self._thinning(conv3, following, notes)
        return Bottleneck(
            conv2, conv3, self._projection(conv2, conv3), following, thinning,
            self._pool(conv3) if following is None else None, tuple(notes),
        )  # fmt: skip

    def _projection(self, conv2: Conv, conv3: Conv) -> Conv | None:
        """The 1x1 in the shortcut, if nobody else reads it and its stride is that of the 3x3."""
        assert conv3.residual is not None
        layer = self.made.get(conv3.residual)
        if not _is_1x1(layer, None) or layer.residual is not None:
            return None
        p, q = layer.problem, conv2.problem
        alone = self.readers[layer.result] == [conv3] and layer.result not in self.returned
        strided = p.stride == q.stride and (p.h, p.w) == (q.h, q.w)
        thinned = p.stride == (1, 1) and (p.h, p.w) == conv3.problem.out_shape[2:]
        fits = p.epilogue == "none" and (strided or thinned) and layer.x not in self.rewritten
        return layer if alone and fits else None

    def _following(self, conv3: Conv, notes: list[str]) -> Conv | None:
        """The next block's first 1x1."""
        for layer in self.readers.get(conv3.result, ()):
            if not isinstance(layer, Conv) or layer.x != conv3.result or layer.residual is not None:
                continue
            p = layer.problem
            if (p.r, p.s) != (1, 1) or p.epilogue != "relu" or p.pool is not None:
                continue
            if _is_1x1(layer):
                return layer
            notes.append(f"the next 1x1, {layer.name}, has stride {p.stride}, groups {p.groups}")
        return None

    def _thinning(self, conv3: Conv, following: Conv, notes: list[str]) -> Conv | None:
        """The strided 1x1 that is, beside the next block's first, the only reader."""
        others = [r for r in self.readers[conv3.result] if r is not following]
        strided = [
            r for r in others
            if isinstance(r, Conv) and r.x == conv3.result and r.residual != conv3.result
            and (r.problem.r, r.problem.s) == (1, 1) and r.problem.stride == (2, 2)
            and r.problem.padding == (0, 0) and r.problem.pool is None
        ]  # fmt: skip
        if not strided:
            return None
        if conv3.result in self.returned:
            notes.append("all pixels of its output are stored, since the model returns it")
            return None
        if len(others) > 1:
            names = ", ".join(r.name for r in others if r is not strided[0])
            notes.append(f"all pixels of its output are stored, since {names} needs them")
            return None
        return strided[0]

    def _pool(self, conv3: Conv) -> Plain | None:
        """The mean over pixels that is the only reader."""
        readers = self.readers.get(conv3.result, [])
        if conv3.result in self.returned or len(readers) != 1 or not isinstance(readers[0], Plain):
            return None
        call, meta = readers[0].call, self.layers.graph.meta
        n, k = conv3.problem.n, conv3.problem.k
        found = meta.get(call.result)
        if found is None or found.shape != (n, k, 1, 1) or found.dtype != conv3.problem.dtype:
            return None
        pooling = call.op is torch.ops.aten.adaptive_avg_pool2d.default
        mean = call.op is torch.ops.aten.mean.dim and not call.kwargs and (
            sorted(d % 4 for d in call.args[1]) == [2, 3]
        )  # fmt: skip
        return readers[0] if pooling or mean else None


def _is_1x1(layer: Layer | None, stride: tuple[int, int] | None = (1, 1)) -> TypeGuard[Conv]:
    """Whether it is a dense 1x1 convolution, of this stride if one is given."""
    if not isinstance(layer, Conv) or layer.problem.pool is not None:
        return False
    p = layer.problem
    plain = (p.r, p.s, p.padding, p.groups) == (1, 1, (0, 0), 1)
    return plain and stride in (None, p.stride)


# --------------------------------------------------------------------------------------------------
# Layers with chained calls among them.
# --------------------------------------------------------------------------------------------------


def chained(layers: Layers, blocks: Sequence[Bottleneck], spans: Sequence[Span]) -> Layers:
    """The layers with calls in the place of bottlenecks.

    Args:
        layers: without any.
        blocks: what `find` found among them.
        spans: of the bottlenecks that are chained, at most one each.

    Raises:
        ValueError: a span is none of its bottleneck's.
    """
    if not spans:
        return layers
    by_value = {block.conv2.result: block for block in blocks}
    chosen: dict[int, Span] = {}
    for span in spans:
        known = by_value.get(span.block)
        if known is None or span not in known.spans() or span.block in chosen:
            raise ValueError(f"{span} does not describe a bottleneck of these layers")
        chosen[span.block] = span
    return _Rewriting(layers, by_value, chosen).result()


class _Rewriting:
    def __init__(
        self, layers: Layers, blocks: Mapping[int, Bottleneck], spans: Mapping[int, Span]
    ) -> None:
        self.layers, self.blocks, self.spans = layers, blocks, spans
        self.meta = dict(layers.graph.meta)
        #: Values of which only the even pixels are left.
        self.thinned = {blocks[i].conv3.result for i, span in spans.items() if span.store == "even"}

    def result(self) -> Layers:
        calls: dict[int, Chained] = {}  # By the result of the 1x1 that ends the bottleneck.
        gone: set[int] = set()
        for i, span in self.spans.items():
            block = self.blocks[i]
            call = self.call(block, span)
            calls[block.conv3.result] = call
            gone.update(part.result for part in call.parts)
        made: list[Layer] = []
        for layer in self.layers.layers:
            if layer.result in calls:
                made.append(calls[layer.result])
            elif layer.result not in gone:
                if isinstance(layer, Conv) and layer.x in self.thinned:
                    made.append(thinned(layer))
                else:
                    made.append(layer)
        graph = replace(self.layers.graph, meta=self.meta)
        spans = tuple(self.spans[i] for i in self.blocks if i in self.spans)
        return replace(self.layers, graph=graph, layers=tuple(made), spans=spans)

    def call(self, block: Bottleneck, span: Span) -> Chained:
        reads = block.projection
        made = block.call(span, reads is not None and reads.x in self.thinned)
        old = self.meta[block.conv3.result]
        for value, shape in zip(
            made.results, (made.problem.out_shape, made.problem.next_shape), strict=False
        ):
            self.meta[value] = Meta(shape, old.dtype, old.device, True)
        return made


__all__ = ["Bottleneck", "Found", "chained", "find", "thinned"]
